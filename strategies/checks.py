"""All that can be wrong with a run, checked before any rank starts; what follows from its settings is a `Plan`."""

import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from strategies import checkpoints, commands, effective, models, resuming
from yardstick import deepspeed_config, deepspeed_memory, launchers, op_cache, ranks, results
from yardstick.settings import SettingsError, check_writable

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
    tensors: object             # deepspeed_memory.Tensors
    shape: object               # ModelShape of the GPT-2 family, else None
    folder: Path                # of this run, absolute; made when something is written
    run: str                    # its name in records: strategies/3_zero_stage2
    command: str                # as a user types it
    notes: list                 # sentences for the user
    swap: Path | None           # of this run's swap files, absolute; None without NVMe
    resume: object = None       # resuming.Resume, or None
    brief: bool = False         # one line at the end in place of the report


def say(text):
    """A line for the user, from the process that starts the ranks, or from rank 0 where a launcher started them."""
    if not ranks.is_rank() or (os.environ["RANK"] == "0" and "STARTED_BY" not in os.environ):
        print(text, file=sys.stderr, flush=True)


def check(settings, given=()):
    """The Plan of a run, or SettingsError; nothing has been started or written to the run's folder yet.

    given: names of the settings that the user gave; a resumed run takes the others from its checkpoint. Builds
    DeepSpeed's C++ ops and tokenizes the data where that has not been done on this machine.
    """
    check_ranges(settings)
    launchers.check()
    try:
        world = int(os.environ["WORLD_SIZE"]) if ranks.is_rank() else ranks.default_world()
    except ValueError as error:
        raise SettingsError(str(error)) from None
    resume = resuming.find(settings, given, world, say)
    if settings["compile"] and not shutil.which(os.environ.get("CXX") or "c++") and not ranks.gpu_count():
        raise SettingsError("compile=True needs a C++ compiler on a CPU, and none is on PATH. Install one (Debian, Ubuntu: "
                            "apt-get install g++), or leave compile= out.")
    if settings["compile"] and not ranks.gpu_count() and " " in sys.prefix:
        raise SettingsError(f"compile=True: torch's compiler for CPUs does not work where the path of torch has a space ({sys.prefix}). "
                            "Move the checkout, or leave compile= out.")
    check_record(settings)
    config = effective.read(settings["strategy"], settings["config"])
    gpu = ranks.gpu_count() > 0
    if not gpu:
        ranks.use_cpu_accelerator()
    elif int(os.environ.get("LOCAL_RANK", 0)) >= ranks.gpu_count():
        raise SettingsError(f"LOCAL_RANK={os.environ['LOCAL_RANK']} but this machine has {ranks.gpu_count()} GPUs. "
                            "Start as many processes as there are GPUs.")
    precision = effective.precision_of(settings, gpu)
    if resume and "global_batch" not in given and settings["global_batch"] % world:
        whole = [n for n in range(1, settings["global_batch"] + 1) if settings["global_batch"] % n == 0]
        raise SettingsError(f"{resume.path} is of a run with global_batch={settings['global_batch']}, which {world} ranks cannot share. "
                            f"Start with RANKS= one of {', '.join(map(str, whole))}.")
    total, micro, times, how = effective.batch_triple(settings, config, world)

    say(f"{settings['strategy']} on {world} {'GPU' if gpu else 'CPU process'}{'s' if world > 1 and gpu else ''}"
        f"{'es' if world > 1 and not gpu else ''}; {how}")
    begin = time.monotonic()
    quiet_libraries()
    model_config, shape = models.configuration(settings, gpu)
    seq = sequence_of(settings, model_config, gpu)
    if precision == "fp16":
        from deepspeed.accelerator import get_accelerator
        if not get_accelerator().is_fp16_supported():
            raise SettingsError("precision=fp16: this device has no fp16 arithmetic that DeepSpeed uses. "
                                "Use precision=bf16 or fp32.")
    corpus, notes = corpus_of(settings, model_config, seq, total), []
    if corpus.note:
        notes.append(corpus.note)
    tensors = models.tensors_of(model_config)
    folder = folder_of(settings)
    nvme = Path(settings["nvme_path"]).resolve() if settings["nvme_path"] else folder
    if settings["nvme_path"] and not nvme.is_dir():
        raise SettingsError(f"nvme_path={settings['nvme_path']} is no folder. Make it, on the disk that is to hold the "
                            "swap files, or leave nvme_path= out.")
    nvme = nvme / f"swap-{stamp()}"                          # DeepSpeed empties it: no two runs may share it
    if config.pop("scheduler", None):
        notes.append("the config's scheduler is left out: the program has its own, schedule= and warmup_steps=")
    config = effective.effective(settings, config, micro=micro, accumulation=times, precision=precision, nvme_path=nvme,
                                 largest_share=-(-max(tensors.numels) // world))
    found = deepspeed_config.lint(config, ranks=world, accelerator=None if gpu else "cpu")
    wrong = [finding for finding in found if finding.level == "error" or finding.fails]
    if wrong:
        raise SettingsError(f"the DeepSpeed config of this run: {wrong[0].key}: {wrong[0].message}")
    notes += [f"{finding.key}: {finding.message}" for finding in found]
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
    plan = Plan(settings, config, ops, world, gpu, precision, total, micro, times, seq, corpus, model_config, tensors,
                shape, folder, "strategies/" + effective.FOLDERS[settings["strategy"]], commands.repeat(settings, world), notes,
                nvme if "async_io" in ops else None, resume)
    check_checkpoints(plan)
    for note in notes:
        say(f"note: {note}")
    return plan


def check_checkpoints(plan):
    """What would keep this run from resuming, saving or exporting; the order is from quick to slow."""
    settings, nbytes = plan.settings, deepspeed_memory.checkpoint_bytes(plan.tensors, plan.config)
    if settings["export"]:
        target = check_writable(Path(settings["export"]).resolve(), "export=")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise SettingsError(f"export={settings['export']} is not empty. Give a folder that does not exist yet.")
        if plan.folder.is_relative_to(target):
            raise SettingsError(f"export={settings['export']} is the run's own folder, or holds it. Give another folder.")
        checkpoints.check_space(target, deepspeed_memory.element_bytes(plan.config) * plan.tensors.count, what="the exported model")
    checkpoints.seal({})                                     # makes the key, or says why it cannot
    if plan.resume:
        resuming.fit(plan.resume, plan)
        later = [step for step in checkpoints.steps_in(plan.folder / "checkpoints") if step.name > f"step_{plan.resume.step:08d}"]
        if later:
            raise SettingsError(f"{plan.folder} holds {later[-1].name}, later than the {plan.resume.path.name} that this run goes on from. "
                                "Give another output=, or resume=auto to go on from the newest.")
    elif checkpoints.steps_in(plan.folder / "checkpoints"):
        raise SettingsError(f"{plan.folder} already holds checkpoints of another run. Give resume=auto to go on with that run, another "
                            "output=, or remove its folder checkpoints.")
    if settings["save_every"]:
        saves = -(-settings["steps"] // settings["save_every"])
        copies = min(saves, settings["keep"] + 1)            # the next is written before the oldest goes
        files = plan.world if plan.config["zero_optimization"].get("stage", 0) else 1
        checkpoints.check_space(plan.folder, nbytes, copies, largest=nbytes // files)
        plan.notes.append(f"a checkpoint of {nbytes / 1e6:,.0f} MB every {settings['save_every']} steps, the newest {settings['keep']} kept")
    if plan.resume:
        if os.environ.get("RANK", "0") == "0":               # of a launcher's ranks one reads all files, not each
            resuming.verify(plan.resume)
        plan.notes.append(f"going on after step {plan.resume.step} of {checkpoints.shown(plan.resume.path)}"
                          + (f", converted from {plan.resume.manifest['world']} ranks" if plan.resume.convert else ""))
        if plan.resume.convert:
            plan.config["checkpoint"] = {**plan.config.get("checkpoint", {}), "load_universal": True}


RANGES = {                       # least and largest value
    "steps": (1, 10**9), "warmup_steps": (0, 10**9), "eval_batches": (0, 10**6), "sample_tokens": (0, 10**6),
    "learning_rate": (0.0, 1e3), "gradient_clipping": (0.0, 1e9), "seed": (0, 2**32 - 1), "timeout_seconds": (1.0, 1e6),
    "reduce_bucket_size": (1, 10**12), "max_live": (0, 10**15), "max_reuse_distance": (0, 10**15),
    "persistence_threshold": (0, 10**15), "sub_group_size": (1, 10**15), "save_every": (0, 10**9), "keep": (1, 10**6)}


def check_ranges(settings):
    """Refuse numbers that DeepSpeed or torch would refuse on the ranks, or take and make nothing of."""
    for key, (least, largest) in RANGES.items():
        value = settings[key]
        if value is None or least <= value <= largest:
            continue
        rule = f"be at least {least:g}" if value < least else f"be at most {largest:g}" if value > largest else "be a number"
        raise SettingsError(f"{key}={value} must {rule}. Give {key}={least:g}, for example, or leave it out.")


def quiet_libraries():
    """Import the slow libraries, with the log lines of theirs that users cannot act on turned off."""
    import logging
    import warnings
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import deepspeed
    import transformers
    deepspeed.utils.logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def folder_of(settings):
    """The run's own folder, absolute; made when something is written. The same for all ranks of a launcher."""
    if settings["output"]:
        return check_writable(Path(settings["output"]).resolve(), "output=")
    return check_writable(ROOT / "runs" / "strategies" / effective.FOLDERS[settings["strategy"]] / stamp(), "output=")


def stamp():
    """A name for this run that no other has: when and as which process it was started."""
    import psutil
    # ranks of one launcher agree on the name without a word: they have the same parent
    pid = os.getppid() if ranks.is_rank() else os.getpid()
    started = time.strftime("%Y%m%d-%H%M%S", time.localtime(psutil.Process(pid).create_time()))
    return os.environ.setdefault("RUN_STAMP", f"{started}-{pid}")


def check_record(settings):
    """What would keep record=LABEL from being written when the run is over."""
    if settings["record"] is None:
        return
    try:
        results.check_label(settings["record"])
    except ValueError as error:
        raise SettingsError(str(error)) from None
    for key in ("config", "model", "data", "tokenizer"):
        if os.path.isabs(settings[key] or ""):
            raise SettingsError(f"{key}={settings[key]} is a path of this machine, which a committed record may not hold "
                                f"(record={settings['record']}). Give a relative path, or leave record= out.")


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


def check_disk(tensors, config, world, nvme):
    """Refuse a run whose swap files do not fit; a note where nothing is large enough to be swapped."""
    items = deepspeed_memory.memory(tensors, config, ranks=world)
    files = {item.kind: item.nbytes for item in items if item.place == "nvme"}
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
    needed = local * sum(files.values())
    check_writable(nvme, "nvme_path=")
    there = next(parent for parent in (nvme, *nvme.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    limit, largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0], deepspeed_memory.largest_swap_file(tensors, config, world)
    if 0 <= limit < largest:                                 # RLIM_INFINITY is -1
        raise SettingsError(f"a swap file takes {largest / 1e6:.0f} MB and this shell allows files of {limit / 1e6:.0f} MB. "
                            "Raise it with `ulimit -f unlimited`, or give a smaller sub_group_size=.")
    if free < 1.1 * needed:
        raise SettingsError(f"the swap files of {local} ranks take {needed / 1e9:.2f} GB and {there} has {free / 1e9:.2f} GB "
                            "free (10 % is kept in reserve). Free some, or give nvme_path= on a larger disk.")
    if not files.get("parameter"):
        return ["no weight's share is as large as 1 MiB on this many ranks, so DeepSpeed keeps all weights in memory"]
    return [f"swap files: {needed / 1e6:.0f} MB over {local} rank{'s' if local > 1 else ''}"]
