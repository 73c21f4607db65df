"""What `yardstick.plan` plans: a model, machines and a batch with all defaults filled in, and the config of each strategy."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from yardstick import deepspeed_memory, formulas, hardware, shapes, step_time
from yardstick.settings import SettingsError, nearest

STRATEGIES = {"dp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "offload": 2, "infinity": 3}          # name: ZeRO stage
HOST_MEMORY = 128e9        # bytes a device; nodes of eight have 1 to 2 TB (AWS: p4d.24xlarge 1152 GiB, p5.48xlarge 2048 GiB)
# FLOP/s, and bytes/s to memory and to the next process, of one process on a CPU: round numbers; peak= and link= give others
CPU_PEAK, CPU_MEMORY, CPU_LINK = 1e11, 1e10, 1e9


@dataclass(frozen=True)
class Job:
    """What is planned: a shape, machines and a batch, with all defaults filled in."""

    settings: dict
    name: str
    shape: object              # ModelShape
    given_folder: str | None   # of the model, as the user wrote it
    notes: tuple
    gpu: bool
    device: str
    machine: object            # step_time.Machine
    memory: dict               # {"device", "host", "nvme": bytes}: of one device, of one node, of one node
    precision: str
    seq: int
    global_batch: int


def job_of(settings):
    """The Job of a run's settings. Raises SettingsError for what cannot be."""
    name, shape, folder, notes = _model(settings)
    device = settings["device"]
    gpu = device != "cpu"
    known = hardware.device_named(device) if gpu else None
    if gpu and not known and None in (settings["device_memory"], settings["peak"], settings["link"], settings["pcie"]):
        near = nearest(device, [*hardware.DEVICES, "cpu"])
        raise SettingsError(f"device={device} is none of {', '.join(hardware.DEVICES)}, cpu. "
                            + (f"Did you mean device={near}? " if near else "") + "For another one give device_memory=, peak=, "
                            "link= and pcie= as well.")
    for key in ("devices", "devices_per_node", "global_batch", "micro_batch", "seq", "device_memory", "peak", "link",
                "node_link", "pcie", "nvme_bandwidth", "host_memory", "efficiency"):
        if settings[key] is not None and not 0 < settings[key] < math.inf:
            raise SettingsError(f"{key}={settings[key]} must be more than 0, and finite.")
    if not 0 <= settings["reserve"] < 1:
        raise SettingsError(f"reserve={settings['reserve']} must lie between 0 and 1.")
    if not 0 <= settings["nvme"] < math.inf:
        raise SettingsError(f"nvme={settings['nvme']} must not be negative, and finite.")
    if settings["efficiency"] > 1:
        raise SettingsError(f"efficiency={settings['efficiency']} must be at most 1: it is a share of the peak.")
    if shape.layers > 10_000:
        raise SettingsError(f"{shape.layers} layers are more than this program plans; 10000 are the most.")
    devices = settings["devices"]
    per_node = settings["devices_per_node"] or (devices if devices <= 8 else 8)
    if devices % per_node:
        raise SettingsError(f"devices={devices} do not fill nodes of devices_per_node={per_node}. Give a divisor of {devices}.")
    precision = settings["precision"]
    if precision == "auto":
        precision = "fp32" if not gpu else "fp16" if known in hardware.NO_BF16 else "bf16"
    if precision == "fp16" and not gpu:
        raise SettingsError("precision=fp16: a CPU has none that DeepSpeed uses. Give precision=bf16 or fp32.")
    if precision == "bf16" and known in hardware.NO_BF16:
        raise SettingsError(f"precision=bf16: {known} has no bf16 arithmetic. Give precision=fp16 or fp32.")
    seq = settings["seq"] or min(1024 if gpu else 128, shape.seq)
    if seq > shape.seq:
        raise SettingsError(f"seq={seq} is longer than the {shape.seq} positions of model={name}. Give seq={shape.seq} or "
                            "less.")
    if seq < 2:
        raise SettingsError(f"seq={seq}: a sequence needs at least 2 tokens, one to predict from and one to predict.")
    total = settings["global_batch"] or 8 * devices
    if total % devices:
        raise SettingsError(f"global_batch={total} cannot be shared out over devices={devices}. Give a multiple of {devices}.")
    if settings["micro_batch"] and total % (devices * settings["micro_batch"]):
        raise SettingsError(f"global_batch={total} is no multiple of micro_batch={settings['micro_batch']} x devices={devices}. "
                            "Give another micro_batch, or leave it out.")
    sheet = hardware.DEVICES.get(known, (0, 1e12 if gpu else CPU_MEMORY, CPU_LINK, CPU_LINK))
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 16e9
    host = settings["host_memory"] * 1e9 if settings["host_memory"] else per_node * HOST_MEMORY if gpu else here
    memory = {"device": (settings["device_memory"] or 0) * 1e9 or (sheet[0] if gpu else host / per_node),
              "host": host if gpu else 0, "nvme": settings["nvme"] * 1e9}
    machine = step_time.Machine(
        devices, per_node, settings["peak"] or (hardware.peak_flops(device, precision) if gpu else CPU_PEAK),
        settings["efficiency"], sheet[1], settings["link"] or sheet[2],
        settings["node_link"] or hardware.NODE_LINKS.get(known, hardware.ETHERNET), settings["pcie"] or sheet[3],
        settings["nvme_bandwidth"] or hardware.NVME_BYTES_PER_SECOND,
        hardware.HOP_SECONDS["nvlink" if sheet[2] > sheet[3] else "pcie"],
        host_adam=hardware.HOST_ADAM_SECONDS["deepspeed" if settings["cpp_ops"] else "torch"])
    return Job(settings, name, shape, folder, tuple(notes), gpu, device, machine, memory, precision, seq, total)


def _model(settings):
    """(name, ModelShape, the folder it came from or None, notes)."""
    sizes = {key: settings[key] for key in ("layers", "hidden", "heads", "vocab")}
    try:
        if any(value is not None for value in sizes.values()):
            missing = [key for key, value in sizes.items() if value is None]
            if missing:
                raise SettingsError(f"a model given by its sizes needs {', '.join(missing)} as well.")
            name = "x".join(str(sizes[key]) for key in ("layers", "hidden", "vocab"))
            return name, shapes.ModelShape(**sizes, seq=settings["seq"] or 1024, **{
                key: settings[key] for key in ("kv_heads", "ffn", "gated", "tied")}), None, []
        name = settings["model"]
        if name in shapes.MODELS:
            return name, shapes.MODELS[name], None, []
        path = Path(name) / "config.json"
        if path.is_file():
            return (Path(name).resolve().name, *_folder(path, name))
    except ValueError as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(str(error)) from None
    near = nearest(name, shapes.MODELS)
    raise SettingsError(f"model={name} is none of {', '.join(shapes.MODELS)}, and no folder with a config.json. "
                        + (f"Did you mean model={near}?" if near else "Sizes may be given as layers= hidden= heads= vocab=."))


def _folder(path, name):
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be read as JSON ({error}). Give the folder of a transformers model.") from None
    try:
        shape, notes = shapes.from_config_json(fields if isinstance(fields, dict) else {})
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{path}: {error}") from None
    return shape, name, notes


def config_of(job, strategy, micro_batch, accumulation, gathers="kept"):
    """The DeepSpeed config of a strategy, with buckets and buffers for this model; what strategies/effective.py makes of it.

    Buckets take one layer's gradients (5 M elements at least, 200 M at most), persistent tensors are those up to ten times
    the width (as transformers' "auto" has it), sub-groups 100 M elements at most. gathers: stage 3 keeps gathered
    weights from forward to backward ("kept", within DeepSpeed's default limits) or frees each after use ("freed").
    """
    stage, shape = STRATEGIES[strategy], job.shape
    layer = sum(formulas.numel(dims) for name, dims in formulas.tensor_shapes(shape) if name.startswith("0."))
    bucket = min(max(5_000_000, layer), 200_000_000)
    precision = "bf16" if strategy == "infinity" else job.precision
    config = {
        "train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation, "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01,
                                                  "torch_adam": True}},
        "bf16": {"enabled": precision == "bf16"}, "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {"stage": stage}, "steps_per_print": 10**9, "wall_clock_breakdown": False}
    zero = config["zero_optimization"]
    if stage in (1, 2):
        zero.update(reduce_bucket_size=bucket, allgather_bucket_size=bucket, reduce_scatter=True, overlap_comm=False,
                    use_multi_rank_bucket_allreduce=True, contiguous_gradients=True, round_robin_gradients=False)
    if stage == 3:
        limit = 10**9 if gathers == "kept" else 0
        zero.update(reduce_bucket_size=bucket, reduce_scatter=True, contiguous_gradients=True, overlap_comm=True,
                    sub_group_size=min(max(2_000_000, layer), 100_000_000),
                    stage3_param_persistence_threshold=10 * shape.hidden, stage3_max_live_parameters=limit,
                    stage3_prefetch_bucket_size=min(bucket, 50_000_000, limit), stage3_max_reuse_distance=limit)
    if job.settings["cpp_ops"]:
        del config["optimizer"]["params"]["torch_adam"]
    elif strategy in ("offload", "infinity"):
        config["zero_force_ds_cpu_optimizer"] = False
    if strategy == "offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if strategy == "infinity":
        share = max(deepspeed_memory.ceil_div(n, job.machine.devices) for n in deepspeed_memory.of_shape(shape).numels)
        nvme = {"device": "nvme", "nvme_path": "runs/nvme", "pin_memory": True}
        zero["offload_optimizer"] = {**nvme, "buffer_count": 4, "fast_init": False}
        zero["offload_param"] = {**nvme, "buffer_count": 5, "buffer_size": share, "max_in_cpu": 0}
        config["aio"] = {"block_size": 2**20, "queue_depth": 8, "single_submit": False, "overlap_events": True,
                         "intra_op_parallelism": 1}
    return config
