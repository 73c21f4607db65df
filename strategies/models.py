"""The model of a run: its configuration, the sizes of its tensors, and, on a rank, the model itself and its use."""

import os

from yardstick import deepspeed_memory, shapes
from yardstick.settings import SettingsError, nearest
from yardstick.shapes import MODELS


def configuration(settings, gpu):
    """(transformers config, ModelShape or None) of settings["model"]; "auto" is put into words there."""
    from transformers import AutoConfig
    if settings["model"] == "auto":
        settings["model"] = "gpt2" if gpu else "tiny"
    name = settings["model"]
    if name in MODELS and not (settings["pretrained"] and name != "tiny"):
        if settings["pretrained"]:
            raise SettingsError("pretrained=True: tiny has no published weights. Use model=gpt2, or pretrained=False.")
        fields = shapes.config_json(MODELS[name])
        return AutoConfig.for_model(fields.pop("model_type"), **fields), MODELS[name]
    near = nearest(name, MODELS)
    if near and near != name and "/" not in name and abs(len(near) - len(name)) < 2:
        raise SettingsError(f"there is no model={name} here. Did you mean model={near}? Others: {', '.join(MODELS)}, a folder, or "
                            "a hub name with its owner.")
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:
        raise SettingsError(f"model={name} is none of {', '.join(MODELS)}, and no folder or hub model that can be read "
                            f"here ({type(error).__name__}: {str(error).splitlines()[0][:160]}). "
                            "Give the path of a folder with config.json, or a name of that list.") from None
    config.use_cache = False
    if settings["pretrained"] and os.path.isdir(name) and not any(
            file.endswith((".safetensors", ".bin", ".safetensors.index.json")) for file in os.listdir(name)):
        raise SettingsError(f"pretrained=True: the folder model={name} has no weights (*.safetensors, *.bin). Leave pretrained= out to "
                            "begin with random ones, or give a folder that save_pretrained has written.")
    return config, None


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
    return deepspeed_memory.Tensors(tuple(p.numel() for p in model.parameters()), tuple(reused))


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


def evaluate(engine, plan, rank, watchdog):
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
            watchdog.moved(f"batch {step + 1} of the evaluation")
            tokens_BT = torch.from_numpy(batches.step(step, rank.rank, rank.world)[0]).to(engine.device)
            total += engine(input_ids=tokens_BT, labels=tokens_BT).loss.float()
    torch.distributed.all_reduce(total)
    engine.train()
    return total.item() / count / rank.world


def sample(engine, plan, watchdog, prompt="def ", temperature=0.8):
    """Text that the model continues, drawn with the run's seed; every rank computes it, as stage 3 needs them all."""
    import torch
    if not plan.settings["sample_tokens"]:
        return None
    generator = torch.Generator().manual_seed(plan.settings["seed"])
    ids = list(plan.corpus.encode(prompt))
    engine.eval()
    with torch.no_grad():
        for _ in range(plan.settings["sample_tokens"]):
            watchdog.moved("the sample")
            window = torch.tensor([ids[-plan.seq:]], device=engine.device)
            logits_V = engine(input_ids=window).logits[0, -1, :plan.corpus.vocab].float().cpu()
            if not torch.isfinite(logits_V).all():           # the run diverged: there is nothing to draw from
                break
            ids.append(torch.multinomial(torch.softmax(logits_V / temperature, -1), 1, generator=generator).item())
    engine.train()
    return plan.corpus.decode(ids)


def export(engine, plan, rank):
    """Write the weights into settings["export"] as transformers reads them, and compare what it reads with them. Collective.

    Safetensors in the precision that computes, tied weights once, with config and tokenizer; the folder appears when complete.
    """
    import shutil
    from pathlib import Path

    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM
    tensors = {}
    for name, parameter in engine.module.named_parameters():                 # tied weights once
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank.rank == 0:
                tensors[name] = parameter.detach().cpu().clone()
    if rank.rank == 0:
        folder = Path(plan.settings["export"]).resolve()
        part = folder.with_name(f".{folder.name}.{os.getpid()}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plan.model_config)
        buffers = {name: value.cpu() for name, value in engine.module.named_buffers() if name in engine.module.state_dict()}
        model.load_state_dict({**tensors, **buffers}, strict=False, assign=True)
        model.tie_weights()
        model.to(next(iter(tensors.values())).dtype)
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(part)
            _tokenizer(plan).save_pretrained(part)
            again = AutoModelForCausalLM.from_pretrained(part, dtype="auto")
            wrong = [name for name, parameter in again.named_parameters() if not torch.equal(parameter, tensors[name])]
            if wrong or again.state_dict().keys() != engine.module.state_dict().keys():
                raise OSError(f"what was written does not read back as the trained weights ({wrong[:3]})")
        except Exception as error:                                           # safetensors has exceptions of its own
            shutil.rmtree(part, ignore_errors=True)
            raise SystemExit(f"export={folder} failed: {str(error).splitlines()[0]}. The weights of the last step are in its checkpoint, "
                             "where one was saved (save_every=): resume=auto export= on another disk writes them.") from None
        try:
            if folder.exists():
                folder.rmdir()                                               # it was checked to be empty
            part.rename(folder)
        except OSError as error:
            raise SystemExit(f"export={folder} cannot be put there ({error.strerror}); the whole model is in {part}.") from None
        print(f"exported {len(tensors)} tensors, read back and compared: model={folder} pretrained=True trains on, "
              "AutoModelForCausalLM.from_pretrained opens it", flush=True)
    torch.distributed.barrier()


def _tokenizer(plan):
    """The run's tokenizer as one of transformers."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from yardstick.data_sources import END
    name = plan.settings["tokenizer"] or (plan.settings["model"] if plan.settings["pretrained"] else None)
    return AutoTokenizer.from_pretrained(name) if name else PreTrainedTokenizerFast(
        tokenizer_object=plan.corpus.tokenizer, bos_token=END, eos_token=END)
