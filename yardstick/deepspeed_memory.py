"""What DeepSpeed 0.19 really holds, from a config and the list of a model's tensors, to the byte.

`formulas.zero_state_bytes` is the paper. This is the release: a second fp32 copy, padding, tensors that
straddle two ranks' shares, parameters that persist, buckets, transfer and swap buffers. Each is an Item with a name, so
that the difference can be read. Sources are modules and symbols of the package deepspeed.
"""

from dataclasses import dataclass

MIN_SWAP_BYTES = 2**20            # runtime/swap_tensor/utils.py: MIN_AIO_BYTES
SWAP_ALIGN_BYTES = 1024           # runtime/swap_tensor/utils.py: AIO_ALIGNED_BYTES


@dataclass(frozen=True)
class Item:
    """Bytes that one rank holds under one name.

    moment: "always", or "gradients" for what lives from backward to the end of the step. in_paper: the summand
    is one of the ZeRO paper's (weights, gradients, optimizer states), whatever its size.
    """

    kind: str              # parameter, gradient, master, optimizer, buffer
    place: str             # device, host, nvme
    name: str
    nbytes: int
    moment: str = "always"
    in_paper: bool = False


@dataclass(frozen=True)
class Tensors:
    """The trained tensors of a model, as DeepSpeed sees them.

    numels: elements of each, in the order of module.parameters(), tied weights once.
    reused: elements of the tensors that a second module uses too (a tied output layer), once for each such use.
    """

    numels: tuple
    reused: tuple = ()

    @property
    def count(self):
        return sum(self.numels)


def of_shape(shape):
    """The Tensors of a ModelShape."""
    from yardstick.formulas import numel, tensor_shapes
    numels = tuple(numel(dims) for _, dims in tensor_shapes(shape))
    return Tensors(numels, (numels[0],) if shape.tied else ())


def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def _up(a, multiple):
    return ceil_div(a, multiple) * multiple


def sections(config):
    """(zero_optimization, stage, where the optimizer is offloaded to, where the weights are) of a DeepSpeed config."""
    zero = config.get("zero_optimization", {})
    optimizer = zero.get("offload_optimizer") or {}
    params = zero.get("offload_param") or {}
    return (zero, zero.get("stage", 0), optimizer.get("device", "none"), params.get("device", "none"))


def element_bytes(config):
    """Bytes of one weight that computes: 2 with bf16 or fp16, else 4."""
    return 2 if any(config.get(key, {}).get("enabled") for key in ("bf16", "fp16")) else 4


def partition_bounds(tensors, ranks, rank):
    """(start, end, flat) of one rank's share of the flat group of stages 1 and 2, in elements.

    The group is padded to a multiple of 2 * ranks (runtime/zero/stage_1_and_2.py: nccl_start_alignment_factor).
    """
    flat = _up(tensors.count, 2 * ranks)
    return rank * flat // ranks, (rank + 1) * flat // ranks, flat


def memory(tensors, config, *, ranks, rank=0, accumulation=1):
    """[Item]: all that one rank's engine holds between steps ("always") and after backward (plus "gradients").

    config: the effective DeepSpeed config (stage, buckets, offload, precision). After backward means after the
    last micro-step, before engine.step().
    """
    zero, stage, offload, offload_param = sections(config)
    s = element_bytes(config)
    torch_adam = config.get("optimizer", {}).get("params", {}).get("torch_adam", False)
    if stage == 0:
        return _stage0(tensors, s, torch_adam)
    if stage in (1, 2):
        return _stage12(tensors, zero, s, ranks, rank, offload, torch_adam, accumulation)
    return _stage3(tensors, config, zero, s, ranks, offload, offload_param, torch_adam)


def _adam(count, place, torch_adam, groups):
    items = [Item("optimizer", place, "Adam's two moments", 8 * count, in_paper=True)]
    if torch_adam:
        items.append(Item("optimizer", place, "torch Adam's step counters", 4 * groups))
    return items


def _stage0(tensors, s, torch_adam):
    """runtime/engine.py: _configure_fp16_optimizer wraps 16-bit weights (FP16_Optimizer or its unfused form)."""
    n = tensors.count
    items = [Item("parameter", "device", "weights", s * n, in_paper=True),
             Item("gradient", "device", "gradients", s * n, "gradients", True)]
    if s == 2:
        items.append(Item("master", "device", "fp32 master weights", 4 * n, in_paper=True))
    return items + _adam(n, "device", torch_adam, len(tensors.numels))


def _stage12(tensors, zero, s, ranks, rank, offload, torch_adam, accumulation):
    """runtime/zero/stage_1_and_2.py: DeepSpeedZeroOptimizer."""
    start, end, flat = partition_bounds(tensors, ranks, rank)
    share, place = end - start, "device" if offload == "none" else "host"
    items = [Item("parameter", "device", "weights", s * tensors.count, in_paper=True),
             Item("parameter", "device", "padding of the flat weights", s * (flat - tensors.count))]
    second = "fp32 master weights" if s == 2 else "second fp32 copy of the own share"
    items.append(Item("master", place, second, 4 * share, in_paper=s == 2))
    items += _adam(share, place, torch_adam, 1)

    position, overlapping = 0, 0              # elements of every tensor of which a part lies in the share
    for numel in tensors.numels:
        if position < end and position + numel > start:
            overlapping += numel
        position += numel
    pad = max(0, end - max(start, tensors.count))
    if offload == "none":
        items += [Item("gradient", "device", "averaged gradients of the own share", s * (share - pad), "gradients", True),
                  Item("gradient", "device", "rest of tensors that straddle the share", s * (overlapping - share + pad),
                       "gradients"),
                  Item("gradient", "device", "padding of the gradients", s * pad, "gradients")]
    else:
        # kept between steps: single_partition_of_fp32_groups[i].grad, accumulated_grads_in_cpu, temp_grad_buffer_*
        items.append(Item("gradient", "host", "fp32 gradients of the own share", 4 * share, in_paper=True))
        if accumulation > 1:
            items.append(Item("gradient", "host", "gradients accumulated over micro-steps", s * overlapping))
        largest = max(tensors.numels)
        items += [Item("buffer", "host", "weights of the own share on their way to the device", s * share),
                  Item("buffer", "host", "transfer buffer of the largest tensor", s * largest),
                  Item("buffer", "device", "transfer buffer of the largest tensor", s * largest)]
    return [item for item in items if item.nbytes]


def _stage3(tensors, config, zero, s, ranks, offload, offload_param, torch_adam):
    """runtime/zero/stage3.py: DeepSpeedZeroOptimizer_Stage3, partition_parameters.py, swap_tensor/."""
    shares = [ceil_div(n, ranks) for n in tensors.numels]          # each tensor is cut alone, the last share padded
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    persistent = sum(ranks * share for n, share in zip(tensors.numels, shares) if n <= threshold)     # padded too
    aio = config.get("aio", {})
    least = max(MIN_SWAP_BYTES, aio.get("block_size", 2**20))
    align = SWAP_ALIGN_BYTES * aio.get("intra_op_parallelism", 1)
    place = "device" if offload == "none" else "host"
    param_place = "device" if offload_param == "none" else "host"
    total = sum(shares)
    items = [Item("parameter", "device", "persistent parameters, whole on every rank", s * persistent),
             Item("buffer", "device", "bucket of gradients to reduce", s * int(zero.get("reduce_bucket_size", 5e8))),
             Item("gradient", place, "gradients of the own share", s * total, in_paper=True)]

    swapped = [n for n in shares if offload_param == "nvme" and s * n >= least]
    items += [Item("parameter", param_place, "weights of the own share", s * (total - sum(swapped)), in_paper=True),
              Item("parameter", "nvme", "weights of the own share in files", sum(_up(s * n, align) for n in swapped),
                   in_paper=True),
              Item("parameter", param_place, "placeholders of weights in files", 2 * s if swapped else 0)]
    groups = sub_groups(shares, zero.get("sub_group_size", 10**9))
    if offload_param == "nvme":
        settings = zero["offload_param"]
        items.append(Item("buffer", "host", "swap buffers of the weights",
                          settings.get("buffer_count", 5) * _up(s * int(settings.get("buffer_size", 1e8)), align)))
        # reserve_partitioned_swap_space takes the whole tensors' sizes, not the shares'
        largest = max(groups, key=lambda group: sum(shares[i] for i in group))
        items.append(Item("buffer", "host", "buffer that writes updated weights",
                          sum(_up(s * tensors.numels[i], align) for i in largest)))

    sizes = [sum(shares[i] for i in group) for group in groups]
    on_disk = [offload == "nvme" and 4 * size >= least for size in sizes]
    kept = sum(size for size, disk in zip(sizes, on_disk) if not disk)
    files = [_up(4 * size, align) for size, disk in zip(sizes, on_disk) if disk]
    second = "fp32 master weights" if s == 2 else "second fp32 copy of the own share"
    items += [Item("master", place, second, 4 * kept, in_paper=s == 2),
              Item("optimizer", place, "Adam's two moments", 8 * kept, in_paper=True),
              Item("master", "nvme", second + " in files", sum(files), in_paper=s == 2),
              Item("optimizer", "nvme", "Adam's two moments in files", 2 * sum(files), in_paper=True)]
    if torch_adam:
        items.append(Item("optimizer", place, "torch Adam's step counters", 4 * len(groups)))
    if offload != "none":
        items.append(Item("gradient", "host", "fp32 gradients of the own share", 4 * kept))
    if offload == "nvme":
        parts = [shares[i] for group, disk in zip(groups, on_disk) if disk for i in group]
        large = [n for n in parts if 4 * n >= least]
        # optimizer_utils.py: _adjust_for_misaligned_lengths writes the aligned part; the rest is a view that keeps all of it
        aligned = [4 * n // align * align for n in large]
        ragged = sum(4 * n for n in large if 4 * n % align)
        count = zero["offload_optimizer"].get("buffer_count", 4)
        items += [Item("gradient", "nvme", "fp32 gradients in files", sum(n for n in aligned if n >= least)),
                  Item("gradient", "host", "fp32 gradients kept whole by a last part that fills no aligned write", ragged,
                       "gradients"),
                  Item("gradient", "host", "fp32 gradients too small for a file", 4 * (sum(parts) - sum(large)), "gradients"),
                  Item("buffer", "host", "swap buffers of the optimizer", count * _up(4 * max(sizes), align))]
    return [item for item in items if item.nbytes]


def sub_groups(shares, size):
    """Indices of the tensors that the optimizer steps together (stage3.py: _create_fp16sub_groups)."""
    if size >= sum(shares):
        return [list(range(len(shares)))]
    groups, group, filled = [], [], 0
    for i, share in enumerate(shares):
        group.append(i)
        filled += share
        if filled >= size or i == len(shares) - 1:
            groups.append(group)
            group, filled = [], 0
    return groups


def by_kind(items, moment="always"):
    """{"kind" or "kind@place": bytes} at rest (moment "always") or after backward ("gradients")."""
    sums = {}
    for item in items:
        if item.moment == "always" or moment == "gradients":
            key = item.kind if item.place == "device" else f"{item.kind}@{item.place}"
            sums[key] = sums.get(key, 0) + item.nbytes
    return sums


def differences(items, paper):
    """[(what, bytes)] between what one rank holds after backward and the paper's formula; the bytes sum up exactly.

    items: of `memory`; paper: of `formulas.zero_state_bytes_by_kind`. First what the paper does not count, then where
    it counts more or less than there is.
    """
    rows = {}
    for item in items:
        if not item.in_paper:
            where = "" if item.place == "device" else f" ({'NVMe files' if item.place == 'nvme' else item.place})"
            rows[item.name + where] = rows.get(item.name + where, 0) + item.nbytes
    for kind in ("parameter", "gradient", "master", "optimizer"):
        held = sum(item.nbytes for item in items if item.in_paper and item.kind == kind)
        gap = held - round(paper.get(kind, 0))
        if not gap:
            continue
        if kind == "gradient" and gap < -held / 4:
            name = "gradients of the other ranks' shares, freed once reduced"
        elif kind == "gradient" and gap > held / 4:
            name = "gradients kept in fp32 where the paper has 16 bits"
        elif kind == "parameter" and gap < 0:
            name = "weights rounded"
        else:
            name = f"{kind}: padding of the shares"
        rows[name] = rows.get(name, 0) + gap
    return sorted(((name, nbytes) for name, nbytes in rows.items() if nbytes), key=lambda row: -abs(row[1]))


def checkpoint_bytes(tensors, config):
    """Bytes of one checkpoint, all ranks' files together: runtime/engine.py: save_checkpoint; padding and headers left out.

    Stages 0 to 2 write the weights that compute and what the optimizer keeps, stage 3 the latter alone. A second fp32
    copy is part of it from stage 1 on, and of 16-bit training everywhere.
    """
    _, stage, _, _ = sections(config)
    s = element_bytes(config)
    weights = 0 if stage == 3 else s
    master = 4 if stage or s == 2 else 0
    return tensors.count * (weights + master + 8)


def largest_swap_file(tensors, config, ranks):
    """Bytes of the largest file that an NVMe run writes on one rank: a sub-group's fp32 weights, or a weight's share."""
    zero, _, offload, offload_param = sections(config)
    shares = [ceil_div(n, ranks) for n in tensors.numels]
    groups = sub_groups(shares, zero.get("sub_group_size", 10**9))
    of_optimizer = 4 * max(sum(shares[i] for i in group) for group in groups) if offload == "nvme" else 0
    return max(of_optimizer, element_bytes(config) * max(shares) if offload_param == "nvme" else 0)
