"""The config that a run hands to DeepSpeed: a strategy's config.json with the run's settings put in."""

import json
from pathlib import Path

from yardstick import deepspeed_config
from yardstick.settings import SettingsError

HERE = Path(__file__).resolve().parent
STAGES = {"dp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "offload": 2, "infinity": 3}
FOLDERS = {"dp": "1_data_parallel", "zero1": "2_zero_stage1", "zero2": "3_zero_stage2", "zero3": "4_zero_stage3",
           "offload": "5_zero_offload", "infinity": "6_zero_infinity"}


def read(strategy, path=None):
    """The config of a strategy, as DeepSpeed reads it (HJSON: comments are allowed); `path`: another file.

    Raises SettingsError for a file that cannot be read, a key that is wrong by itself, and another strategy's stage.
    """
    path = Path(path) if path else HERE / FOLDERS[strategy] / "config.json"
    try:
        config = deepspeed_config.read(path)
    except ValueError as error:
        raise SettingsError(f"{error} One that works as config= is strategies/{FOLDERS[strategy]}/config.json.") from None
    _check(config, strategy, path)
    return config


def _check(config, strategy, path):
    """Refuse a config with a wrong key, or whose stage is another strategy's; what is given as null is not given."""
    wrong = [found for found in deepspeed_config.check_keys(config) if found.level == "error"]
    if wrong:
        more = f" {len(wrong) - 1} more: python -m yardstick.deepspeed_config lint {path}." if wrong[1:] else ""
        raise SettingsError(f"{path}: \"{wrong[0].key}\": {wrong[0].message}{more}")
    if isinstance(config.get("zero_optimization"), bool):
        raise SettingsError(f"{path}: \"zero_optimization\" is {json.dumps(config['zero_optimization'])}, an old form. "
                            "Write {\"stage\": 1}, for example.")
    for section in (config, config.get("optimizer", {})):
        for key in [key for key, value in section.items() if value is None]:
            del section[key]
    if config.get("checkpoint", {}).get("load_universal") or config.get("zero_optimization", {}).get("elastic_checkpoint"):
        raise SettingsError(f"{path}: \"checkpoint.load_universal\" and \"zero_optimization.elastic_checkpoint\" are set by this program "
                            "where it resumes on another number of ranks. Delete them.")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != STAGES[strategy]:
        fitting = [name for name, number in STAGES.items() if number == stage]
        raise SettingsError(f"{path} is ZeRO stage {json.dumps(stage)} and strategy={strategy} is stage {STAGES[strategy]}. "
                            + (f"Give strategy={' or '.join(fitting)}." if fitting else "The stages are 0, 1, 2 and 3."))


def batch_triple(settings, config, world):
    """(global_batch, micro_batch, accumulation, how they follow) with global = micro * accumulation * ranks.

    What the command line gives is kept; of the other two the config's micro_batch is kept before its
    accumulation. Raises SettingsError when the product cannot hold.
    """
    given = {key: settings[key] for key in ("global_batch", "micro_batch", "accumulation") if settings[key] is not None}
    for key, value in given.items():
        if value < 1:
            raise SettingsError(f"{key}={value} must be at least 1.")
    total, micro, times = (given.get(key) for key in ("global_batch", "micro_batch", "accumulation"))
    if total is None:
        total = config.get("train_batch_size") if len(given) < 2 else None
    if total is None:
        micro = micro or config.get("train_micro_batch_size_per_gpu", 1)
        times = times or config.get("gradient_accumulation_steps", 1)
        total = micro * times * world
    elif micro is None and times is not None:
        micro = _share(total, times * world, f"accumulation={times} x {world} ranks", "micro_batch")
    elif times is None:
        if micro is None:                    # the file's micro-batch, or the largest divisor of it that fits
            micro = config.get("train_micro_batch_size_per_gpu", 1)
            while micro > 1 and total % (micro * world):
                micro -= 1
        times = _share(total, micro * world, f"micro_batch={micro} x {world} ranks", "accumulation")
    if total != micro * times * world:
        raise SettingsError(f"global_batch={total} is not micro_batch={micro} x accumulation={times} x {world} ranks = "
                            f"{micro * times * world}. Leave one of the three out; it then follows from the others.")
    how = (f"batch: {total} sequences a step = {micro} in each forward (micro_batch) x {times} forwards a step "
           f"(accumulation) x {world} rank{'s' if world > 1 else ''}")
    return total, micro, times, how


def _share(total, parts, why, what):
    if total % parts:
        raise SettingsError(f"global_batch={total} cannot be divided by {why} = {parts}, so there is no whole {what}. "
                            f"Use global_batch={max(1, round(total / parts)) * parts}, or another number of ranks (RANKS=).")
    return total // parts


def precision_of(settings, gpu):
    """"fp32", "bf16" or "fp16": auto is fp32 on a CPU, bf16 on a GPU, and bf16 always for infinity."""
    wanted = settings["precision"]
    if settings["strategy"] == "infinity":
        if wanted not in ("auto", "bf16"):
            raise SettingsError(f"precision={wanted} does not work with strategy=infinity: DeepSpeed keeps the "
                                "weights it moves to NVMe in bf16 here. Leave precision= out, or use strategy=offload.")
        return "bf16"
    return ("bf16" if gpu else "fp32") if wanted == "auto" else wanted


def effective(settings, config, *, micro, accumulation, precision, nvme_path=None, largest_share=0):
    """`config` with the run's settings put in; what is None in the settings stays as the file has it.

    largest_share: elements of the largest tensor's share of one rank; the NVMe buffers must hold it.
    """
    config = json.loads(json.dumps(config))
    config.pop("train_batch_size", None)                     # follows from the other two and the ranks
    config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"] = micro, accumulation
    config["bf16"] = {**config.get("bf16", {}), "enabled": precision == "bf16"}
    config["fp16"] = {**config.get("fp16", {}), "enabled": precision == "fp16"}
    if settings["gradient_clipping"] is not None:
        config["gradient_clipping"] = settings["gradient_clipping"]
    parameters = config.setdefault("optimizer", {"type": "AdamW", "params": {}}).setdefault("params", {})
    if settings["learning_rate"] is not None:
        parameters["lr"] = settings["learning_rate"]
    zero = config.setdefault("zero_optimization", {"stage": 0})
    for key, name in (("reduce_bucket_size", "reduce_bucket_size"), ("max_live", "stage3_max_live_parameters"),
                      ("max_reuse_distance", "stage3_max_reuse_distance"), ("sub_group_size", "sub_group_size"),
                      ("persistence_threshold", "stage3_param_persistence_threshold")):
        if settings[key] is not None:
            if name != "reduce_bucket_size" and zero.get("stage", 0) != 3:
                raise SettingsError(f"{key}={settings[key]} belongs to ZeRO stage 3; strategy={settings['strategy']} is "
                                    f"stage {zero.get('stage', 0)}. Leave it out or use strategy=zero3 or infinity.")
            zero[name] = settings[key]
    if settings["cpp_ops"]:                                  # DeepSpeed's compiled Adam in place of torch's
        parameters.pop("torch_adam", None)
        config.pop("zero_force_ds_cpu_optimizer", None)
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key) or {}
        if section.get("device") == "nvme":
            section["nvme_path"] = str(nvme_path)
        if key == "offload_param" and section.get("device") == "nvme":
            section["buffer_size"] = max(int(section.get("buffer_size", 0)), largest_share)
    return config


def ops_of(config):
    """DeepSpeed's C++ ops that a config needs, with those that training never calls left out."""
    optimizer = config.get("optimizer", {})
    zero = config.get("zero_optimization", {})
    devices = [(zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")]
    ops = ["async_io"] if "nvme" in devices else []
    if optimizer.get("type", "").lower() in ("adam", "adamw") and not optimizer.get("params", {}).get("torch_adam"):
        ops.append("cpu_adam" if devices[0] != "none" else "fused_adam")
    return ops
