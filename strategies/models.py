"""A run checked before any rank starts (`Plan`), and the model that each rank then builds, evaluates and samples."""

import math
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from strategies import effective
from yardstick import deepspeed_formulas, op_cache, ranks
from yardstick.settings import SettingsError, nearest
from yardstick.shapes import MODELS

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Plan:
    """All that a run needs, decided once: the same on every rank."""

    settings: dict
    config: dict                # the effective DeepSpeed config
    ops: list                   # C++ ops it needs
    world: int
    gpu: bool
    precision: str
    global_batch: int
    micro_batch: int
    accumulation: int
    seq: int
    corpus: object
    model_config: object        # of transformers
    tensors: object             # deepspeed_formulas.Tensors
    shape: object               # ModelShape of the GPT-2 family, else None
    folder: Path                # of this run, absolute; made when something is written
    run: str                    # its name in records: strategies/3_zero_stage2
    command: str                # as a user types it
    notes: list                 # sentences for the user


def say(text):
    """A line for the user, from the one process that starts the ranks, or from rank 0."""
    if not ranks.is_rank() or os.environ.get("RANK") == "0":
        print(text, file=sys.stderr, flush=True)


def check(settings):
    """The Plan of a run, or SettingsError; nothing has been started or written to the run's folder yet.

    Builds DeepSpeed's C++ ops and tokenizes the data where that has not been done on this machine.
    """
    for key, least in (("steps", 1), ("warmup_steps", 0), ("eval_batches", 0), ("sample_tokens", 0)):
        if settings[key] < least:
            raise SettingsError(f"{key}={settings[key]} must be at least {least}.")
    config = effective.read(settings["strategy"], settings["config"])
    try:
        world = int(os.environ["WORLD_SIZE"]) if ranks.is_rank() else ranks.default_world()
    except ValueError as error:
        raise SettingsError(str(error)) from None
    gpu = ranks.gpu_count() > 0
    if not gpu:
        ranks.use_cpu_accelerator()
    elif int(os.environ.get("LOCAL_RANK", 0)) >= ranks.gpu_count():
        raise SettingsError(f"LOCAL_RANK={os.environ['LOCAL_RANK']} but this machine has {ranks.gpu_count()} GPUs. "
                            "Start as many processes as there are GPUs.")
    precision = effective.precision_of(settings, gpu)
    total, micro, times, how = effective.batch_triple(settings, config, world)

    say(f"{settings['strategy']} on {world} {'GPU' if gpu else 'CPU process'}{'s' if world > 1 and gpu else ''}"
        f"{'es' if world > 1 and not gpu else ''}; {how}")
    begin = time.monotonic()
    quiet_libraries()
    model_config, shape = model_of(settings, gpu)
    seq = sequence_of(settings, model_config, gpu)
    if precision == "fp16":
        from deepspeed.accelerator import get_accelerator
        if not get_accelerator().is_fp16_supported():
            raise SettingsError("precision=fp16: this device has no fp16 arithmetic that DeepSpeed uses. "
                                "Use precision=bf16 or fp32.")
    corpus, notes = corpus_of(settings, model_config, seq, total), []
    if corpus.note:
        notes.append(corpus.note)
    tensors = tensors_of(model_config)
    folder = folder_of(settings)
    nvme = Path(settings["nvme_path"]).resolve() if settings["nvme_path"] else folder / "nvme"
    if settings["nvme_path"] and not nvme.is_dir():
        raise SettingsError(f"nvme_path={settings['nvme_path']} is no folder. Make it, on the disk that is to hold the "
                            "swap files, or leave nvme_path= out.")
    if settings["nvme_path"]:
        nvme = nvme / folder.name                            # DeepSpeed empties it: two runs must not share it
    config = effective.effective(settings, config, micro=micro, accumulation=times, precision=precision, nvme_path=nvme,
                                 largest_share=-(-max(tensors.numels) // world))
    ops = effective.ops_of(config)
    if not ops and config["optimizer"]["params"].get("torch_adam") and not gpu:
        notes.append("the optimizer is torch's Adam, which needs no compiler; cpp_ops=True takes DeepSpeed's")
    if "async_io" in ops:
        notes += check_disk(tensors, config, world, nvme)
    try:
        op_cache.prepare(ops, say=say)
    except op_cache.OpError as error:
        raise SettingsError(str(error)) from None
    say(f"model {settings['model']}: {tensors.count:,} parameters, {seq} tokens a sequence, {precision}; data {corpus.name}: "
        f"{len(corpus.train):,} tokens  (checked in {time.monotonic() - begin:.0f} s)")
    for note in notes:
        say(f"note: {note}")
    return Plan(settings, config, ops, world, gpu, precision, total, micro, times, seq, corpus, model_config, tensors,
                shape, folder, "strategies/" + effective.FOLDERS[settings["strategy"]], command_of(settings), notes)


def command_of(settings):
    """The command that repeats this run, with no path of this machine: run.sh and what differs from its defaults."""
    words = [a for a in sys.argv[1:] if "=" in a and not a.startswith(("--", "strategy=", "output=", "nvme_path="))]
    ranks_given = f"RANKS={os.environ['RANKS']} " if os.environ.get("RANKS") else ""
    return ranks_given + shlex.join(["bash", f"strategies/{effective.FOLDERS[settings['strategy']]}/run.sh", *words])


def quiet_libraries():
    """Import the slow libraries, with the log lines of theirs that users cannot act on turned off."""
    import logging
    import warnings
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import deepspeed
    import transformers
    deepspeed.utils.logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()


def folder_of(settings):
    """The run's own folder, absolute; made when something is written. The same for all ranks of a launcher."""
    if settings["output"]:
        return Path(settings["output"]).resolve()
    import psutil
    # ranks of one launcher agree on the name without a word: they have the same parent
    pid = os.getppid() if ranks.is_rank() else os.getpid()
    started = time.strftime("%Y%m%d-%H%M%S", time.localtime(psutil.Process(pid).create_time()))
    stamp = os.environ.setdefault("RUN_STAMP", f"{started}-{pid}")
    return ROOT / "runs" / "strategies" / effective.FOLDERS[settings["strategy"]] / stamp


def model_of(settings, gpu):
    """(transformers config, ModelShape or None) of settings["model"]; "auto" is put into words there."""
    from transformers import AutoConfig, GPT2Config
    if settings["model"] == "auto":
        settings["model"] = "gpt2" if gpu else "tiny"
    name = settings["model"]
    if name in MODELS and not (settings["pretrained"] and name != "tiny"):
        if settings["pretrained"]:
            raise SettingsError("pretrained=True: tiny has no published weights. Use model=gpt2, or pretrained=False.")
        shape = MODELS[name]
        # no dropout, so that every strategy computes the same; token 0 ends a document of the embedded text
        return GPT2Config(n_layer=shape.layers, n_embd=shape.hidden, n_head=shape.heads, vocab_size=shape.vocab,
                          n_positions=shape.seq, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0,
                          attn_pdrop=0.0, use_cache=False), shape
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:
        near = nearest(name, MODELS)
        raise SettingsError(f"model={name} is none of {', '.join(MODELS)}, and no folder or hub model that can be read "
                            f"here ({type(error).__name__}: {str(error).splitlines()[0][:160]}). "
                            + (f"Did you mean model={near}?" if near and near != name else
                               "Give the path of a folder with config.json, or a name of that list.")) from None
    config.use_cache = False
    return config, None


def sequence_of(settings, model_config, gpu):
    limit = getattr(model_config, "max_position_embeddings", None) or getattr(model_config, "n_positions", None)
    seq = settings["seq"] if settings["seq"] is not None else min(1024 if gpu else 128, limit or 1024)
    if seq < 2:
        raise SettingsError(f"seq={seq}: a sequence needs at least 2 tokens, one to predict from and one to predict.")
    if limit and seq > limit:
        raise SettingsError(f"seq={seq} is longer than the model's {limit} positions. Use seq={limit} or less.")
    return seq


def corpus_of(settings, model_config, seq, global_batch):
    from yardstick import data
    tokenizer = settings["tokenizer"]
    if tokenizer is None and settings["pretrained"]:
        tokenizer = settings["model"]
    try:
        corpus = data.load(settings["data"], tokenizer=tokenizer)
        data.Batches(corpus.train, seq, global_batch, settings["seed"])
    except (ValueError, OSError) as error:
        raise SettingsError(str(error)) from None
    if corpus.vocab > model_config.vocab_size:
        raise SettingsError(f"the tokenizer has {corpus.vocab} tokens and the model's vocabulary {model_config.vocab_size}. "
                            "Use the model's own tokenizer (tokenizer=), or another model.")
    return corpus


def tensors_of(model_config):
    """The model's Tensors, without allocating them: sizes in order, and what a second module uses again."""
    import torch
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    model.tie_weights()
    uses = [parameter for module in model.modules() for parameter in module._parameters.values() if parameter is not None]
    once, reused = set(), []
    for parameter in uses:
        if id(parameter) in once:
            reused.append(parameter.numel())
        once.add(id(parameter))
    return deepspeed_formulas.Tensors(tuple(p.numel() for p in model.parameters()), tuple(reused))


def check_disk(tensors, config, world, nvme):
    """Refuse a run whose swap files do not fit; a note where nothing is large enough to be swapped."""
    items = deepspeed_formulas.memory(tensors, config, ranks=world)
    files = {item.kind: item.nbytes for item in items if item.place == "nvme"}
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
    needed = local * sum(files.values())
    there = next(parent for parent in (nvme, *nvme.parents) if parent.exists())
    if not os.access(there, os.W_OK):
        raise SettingsError(f"{there} cannot be written, and infinity keeps its swap files there. Give another "
                            "nvme_path=.")
    free = shutil.disk_usage(there).free
    if free < 1.1 * needed:
        raise SettingsError(f"the swap files of {local} ranks take {needed / 1e9:.2f} GB and {there} has {free / 1e9:.2f} GB "
                            "free (10 % is kept in reserve). Free some, or give nvme_path= on a larger disk.")
    if not files.get("parameter"):
        return ["no weight's share is as large as 1 MiB on this many ranks, so DeepSpeed keeps all weights in memory"]
    return [f"swap files: {needed / 1e6:.0f} MB over {local} rank{'s' if local > 1 else ''}"]


def build(plan):
    """The model of a plan on this rank's device: random weights from the run's seed, or pretrained ones.

    Built whole on every rank; deepspeed.initialize then shares it out. Under deepspeed.zero.Init the weights would
    not get transformers' initialisation (embeddings of standard deviation 1 in place of 0.02).
    """
    import torch
    from transformers import AutoModelForCausalLM
    if plan.settings["pretrained"]:
        model = AutoModelForCausalLM.from_pretrained(plan.settings["model"], config=plan.model_config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(plan.model_config)
    if plan.settings["activation_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if plan.settings["compile"]:
        model.compile()
    return model


def evaluate(engine, plan, rank):
    """Mean loss, in nats per token, over eval_batches of the held-out text; None where it is too short or not asked for."""
    import torch

    from yardstick import data
    count = plan.settings["eval_batches"]
    if not count or len(plan.corpus.validation) < plan.seq * rank.world:
        return None
    batches = data.Batches(plan.corpus.validation, plan.seq, rank.world, seed=0)
    engine.eval()
    total = torch.zeros((), device=engine.device)
    with torch.no_grad():
        for step in range(count):
            tokens_BT = torch.from_numpy(batches.step(step, rank.rank, rank.world)[0]).to(engine.device)
            total += engine(input_ids=tokens_BT, labels=tokens_BT).loss.float()
    torch.distributed.all_reduce(total)
    engine.train()
    return total.item() / count / rank.world


def sample(engine, plan, prompt="def ", temperature=0.8):
    """Text that the model continues, drawn with the run's seed; every rank computes it, as stage 3 needs them all."""
    import torch
    if not plan.settings["sample_tokens"]:
        return None
    generator = torch.Generator().manual_seed(plan.settings["seed"])
    ids = list(plan.corpus.encode(prompt))
    engine.eval()
    with torch.no_grad():
        for _ in range(plan.settings["sample_tokens"]):
            window = torch.tensor([ids[-plan.seq:]], device=engine.device)
            logits_V = engine(input_ids=window).logits[0, -1, :plan.corpus.vocab].float().cpu()
            ids.append(torch.multinomial(torch.softmax(logits_V / temperature, -1), 1, generator=generator).item())
    engine.train()
    return plan.corpus.decode(ids)


def perplexity(nats):
    """e to the loss, or infinity where that overflows."""
    return math.exp(nats) if nats < 700 else math.inf
