"""Bytes held by a live DeepSpeed engine, per kind and place, read from its own tensors and files.

`held(engine)` walks the attributes under which DeepSpeed keeps its tensors (below, in `_owners`), counts each
storage once under its first owner, and then looks at every tensor that Python can reach: what no attribute
names is returned as `unnamed`, so nothing can hide.
"""

import gc
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

KINDS = ("parameter", "gradient", "master", "optimizer", "buffer")


@dataclass(frozen=True)
class Row:
    """One attribute of the engine: what it holds, where the bytes lie, how many."""

    kind: str              # one of KINDS
    place: str             # "device", "host" or "nvme"
    name: str              # the attribute, as a reader finds it in DeepSpeed's source
    nbytes: int


def _tensors(value):
    """Every tensor inside nested lists, tuples, sets, deques and dicts."""
    import torch
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple, set)) or type(value).__name__ == "deque":
        for item in value:
            yield from _tensors(item)


def _owners(engine):
    """(kind, offloaded, name, tensors) of everything a DeepSpeed 0.19 engine holds, owners before views.

    `offloaded` marks what lies on the host when the optimizer is offloaded; on a machine whose device is the
    CPU the tensor itself cannot tell.
    """
    optimizer, module = engine.optimizer, engine.module
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = list(module.parameters())

    def get(*names):
        value = optimizer
        for name in names:
            value = getattr(value, name, None)
        return value

    masters = [t for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat", "fp32_groups")
               for t in _tensors(get(name)) if t is not None]
    for state in inner.state.values():
        for name, value in state.items():
            yield "optimizer", True, f"optimizer.state[{name}]", _tensors(value)
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat", "fp32_groups"):
        yield "master", True, f"optimizer.{name}", _tensors(get(name))
    yield "gradient", True, "fp32 gradient of the master", [m.grad for m in masters if m.grad is not None]
    for name in ("accumulated_grads_in_cpu", "offload_gradient_dict"):
        yield "gradient", True, f"optimizer.{name}", _tensors(get(name))
    yield "parameter", True, "optimizer.param_groups_fp16_flat_cpu_memory", _tensors(get("param_groups_fp16_flat_cpu_memory"))
    for name in ("bit16_groups_flat", "fp16_groups_flat", "lp_param_buffer", "fp16_partitioned_groups_flat"):
        yield "parameter", False, f"optimizer.{name}", _tensors(get(name))
    swapper = next((p.nvme_swapper for p in parameters if getattr(p, "nvme_swapper", None) is not None), None)
    if swapper is not None:
        yield "buffer", True, "param.nvme_swapper.buffers", _tensors(swapper.buffers)
        yield "buffer", True, "param.nvme_swapper.partitioned_swap_buffer", _tensors(swapper.partitioned_swap_buffer)
    yield "parameter", swapper is not None, "param.ds_tensor", [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    yield "parameter", False, "param.data", [p.data for p in parameters]
    yield "gradient", False, "param.grad", [p.grad for p in parameters if p.grad is not None]
    yield "gradient", False, "param.grad_accum", [p.grad_accum for p in parameters
                                                  if getattr(p, "grad_accum", None) is not None]
    yield "gradient", True, "optimizer.grad_partitions_flat_buffer", _tensors(get("grad_partitions_flat_buffer"))
    for name in ("averaged_gradients", "all_grad_tensors", "grads_in_partition"):
        yield "gradient", False, f"optimizer.{name}", _tensors(get(name))
    yield "buffer", True, "optimizer.param_buffer_of_bit16_for_cpu_offload_groups", _tensors(
        get("param_buffer_of_bit16_for_cpu_offload_groups"))
    yield "buffer", True, "optimizer.temp_grad_buffer_for_cpu_offload", _tensors(get("temp_grad_buffer_for_cpu_offload"))
    yield "buffer", False, "optimizer.temp_grad_buffer_for_gpu_offload", _tensors(get("temp_grad_buffer_for_gpu_offload"))
    for bucket in (get("ipg_buckets") or {}).values():
        yield "buffer", False, "optimizer.ipg_buckets", _tensors(vars(bucket))
    optimizer_swapper = get("optimizer_swapper")
    if optimizer_swapper is not None:
        infos = optimizer_swapper.swap_params_info.values()
        yield "gradient", True, "swap_params_info.unswapped_gradients", _tensors(
            [info.unswapped_gradients for info in infos])
        yield "buffer", True, "optimizer_swapper.swap_buffer_manager", _tensors(vars(optimizer_swapper.swap_buffer_manager))
    yield "buffer", False, "module buffers", module.buffers()


def held(engine):
    """(rows, unnamed): what this rank's engine holds, and storages that no attribute of `_owners` names.

    unnamed: [(shape, dtype, bytes)], every tensor Python can reach but the engine's known ones; between steps the
    batch, the last loss and DeepSpeed's scalar tensors are what is left. Saved activations are held by
    autograd in C++ and not seen: call between steps, or use `activations`.
    """
    import torch
    offload = _offloads(engine)
    rows, seen = [], set()
    sums = defaultdict(int)
    for kind, offloaded, name, tensors in _owners(engine):
        for tensor in tensors:
            for storage in _storages(tensor):
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    device = tensor.device.type
                    place = "host" if (offload and offloaded) or (device == "cpu" and engine.device.type != "cpu") else "device"
                    sums[kind, place, name] += storage.nbytes()
    rows = [Row(*key, nbytes) for key, nbytes in sums.items() if nbytes]
    rows += _files(engine)
    gc.collect()
    unnamed = []
    for thing in gc.get_objects():
        try:
            if not isinstance(thing, torch.Tensor):
                continue
        except ReferenceError:                            # a weak proxy whose object is gone
            continue
        for tensor in (thing, thing._base, thing.grad if thing.is_leaf else None):
            for storage in _storages(tensor):
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    unnamed.append((tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), storage.nbytes()))
    return rows, unnamed


def _storages(tensor):
    """The storage of a tensor that has memory: none for None, meta, sparse, and the fake tensors of torch.compile."""
    if tensor is None or tensor.device.type == "meta" or str(tensor.layout) != "torch.strided":
        return
    try:
        storage = tensor.untyped_storage()
        if storage.data_ptr():
            yield storage
    except RuntimeError:                                  # a FakeTensor names a device and has no data
        return


def _offloads(engine):
    config = getattr(engine, "zero_offload_optimizer", lambda: None)()
    return config is not None and str(getattr(config.device, "value", config.device)) in ("cpu", "nvme")


def swap_folder(engine):
    """The folder that holds this engine's swap files, or None: <nvme_path>/zero_stage_3."""
    config = engine.zero_offload_optimizer() if hasattr(engine, "zero_offload_optimizer") else None
    path = getattr(config, "nvme_path", None)
    return Path(path) / "zero_stage_3" if path else None


def _files(engine):
    import torch.distributed as dist
    folder = swap_folder(engine)
    rank = dist.get_rank() if dist.is_initialized() else 0
    sums = defaultdict(int)
    for path in folder.glob(f"*/rank{rank}/**/*.swp") if folder else ():
        if path.parts[len(folder.parts)].endswith("params"):
            kind = "parameter"
        else:
            kind = ("gradient" if "_gradient_" in path.name else
                    "optimizer" if path.name.startswith("exp_avg") else "master")   # the master has no prefix
        sums[kind, path.parent.parent.name + "/" + path.name] += path.stat().st_size
    return [Row(kind, "nvme", name, nbytes) for (kind, name), nbytes in sums.items()]


def totals(rows):
    """{"kind" or "kind@place": bytes}; what lies on the device has no suffix."""
    sums = defaultdict(int)
    for row in rows:
        sums[row.kind if row.place == "device" else f"{row.kind}@{row.place}"] += row.nbytes
    return dict(sums)
