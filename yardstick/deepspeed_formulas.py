"""What DeepSpeed 0.19 really holds and sends, from a config and the list of a model's tensors, to the byte.

`formulas.zero_state_bytes` is the paper. This is the release: a second fp32 copy, padding, tensors that
straddle two ranks' shares, parameters that persist, buckets, transfer and swap buffers, all-reduce where the
paper has reduce-scatter. Each is an Item or a Collective with a name, so that the difference can be read.
Sources are modules and symbols of the package deepspeed.
"""

from dataclasses import dataclass

MIN_SWAP_BYTES = 2**20            # runtime/swap_tensor/utils.py: MIN_AIO_BYTES
SWAP_ALIGN_BYTES = 1024           # runtime/swap_tensor/utils.py: AIO_ALIGNED_BYTES
FALLBACK_BUCKET = 500_000_000     # elements; runtime/engine.py: DeepSpeedEngine.buffered_allreduce_fallback


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
class Collective:
    """What one rank takes part in per optimizer step: payload is the bytes of the full tensors."""

    kind: str
    phase: str             # forward, backward, step
    calls: int | None      # None: depends on the order of modules, on prefetching, or on how a tensor larger than
                           # the bucket is cut
    payload_bytes: int
    why: str


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


def _ceil(a, b):
    return -(-a // b)


def _up(a, multiple):
    return _ceil(a, multiple) * multiple


def _zero(config):
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
    zero, stage, offload, offload_param = _zero(config)
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
    shares = [_ceil(n, ranks) for n in tensors.numels]          # each tensor is cut alone, the last share padded
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    persistent = sum(n for n in tensors.numels if n <= threshold)
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
    groups = _sub_groups(shares, zero.get("sub_group_size", 10**9))
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


def _sub_groups(shares, size):
    """Indices of the tensors that the optimizer steps together (stage3.py: _create_fp16_sub_groups)."""
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


def buckets(numels, size):
    """Payloads, in elements, of the all-reduces that a walk over gradients cuts at `size` elements.

    A bucket is sent when the next tensor would overflow it; a larger tensor goes alone.
    """
    sent, filled = [], 0
    for n in numels:
        if filled and filled + n > size:
            sent.append(filled)
            filled = 0
        filled += n
    return sent + ([filled] if filled else [])


def traffic(tensors, config, *, ranks, accumulation=1, first=False):
    """[Collective] of one optimizer step, on each of `ranks` data-parallel ranks; first=True: of a run's very first step.

    Payload bytes are exact. Numbers of calls assume that gradients arrive in the reverse order of the tensors.
    Between "keeps all" and "keeps nothing" (stage 3 with limits inside the model's size) the gathers of backward
    depend on the order of modules: their payload is then an upper bound, and `why` says so.
    """
    zero, stage, offload, _ = _zero(config)
    s, n = element_bytes(config), tensors.count
    clip = config.get("gradient_clipping", 0.0) > 0
    size = int(zero.get("reduce_bucket_size", 5e8))
    rows = []
    if ranks == 1:
        return rows
    if stage == 0:
        sent = buckets(tensors.numels, FALLBACK_BUCKET)
        rows.append(Collective("all_reduce", "backward", len(sent), s * n, "gradients, at the last micro-step"))
        if s == 4 and clip:
            rows.append(Collective("all_reduce", "step", 1, 4, "norm of the gradients"))
    elif stage in (1, 2):
        times = accumulation if stage == 2 else 1
        order = tensors.numels if stage == 1 else tensors.numels[::-1]
        calls = times * len(buckets(order, size)) if max(tensors.numels) <= size else None
        rows.append(Collective("all_reduce", "backward", calls, times * s * n,
                               "gradients, whole buckets to every rank"
                               + (", at each micro-step" if stage == 2 else ", at the last micro-step")))
        rows.append(Collective("all_gather", "step", 1, s * partition_bounds(tensors, ranks, 0)[2], "updated weights"))
        rows.append(Collective("all_reduce", "step", 1, 4, "norm of the gradients"))
        if s == 2:
            rows.append(Collective("all_reduce", "step", 1, 1, "overflow flag"))
    else:
        rows += _traffic3(tensors, zero, s, ranks, accumulation, offload, size, first)
    return rows


def stage3_keeps(tensors, zero):
    """"all" when gathered parameters stay until the end of backward, "none" when each is freed after use, else "some".

    runtime/zero/partitioned_param_coordinator.py: a parameter is kept when its next use lies within
    max_reuse_distance elements; from the first layer's forward to its backward that is twice the model.
    """
    live = zero.get("stage3_max_live_parameters", 10**9)
    reuse = zero.get("stage3_max_reuse_distance", 10**9)
    if reuse == 0:
        return "none"
    return "all" if reuse >= 2 * (tensors.count + sum(tensors.reused)) and live >= tensors.count else "some"


def _traffic3(tensors, zero, s, ranks, accumulation, offload, size, first):
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    padded = [_ceil(n, ranks) * ranks for n in tensors.numels]
    persistent = [p for n, p in zip(tensors.numels, padded) if n <= threshold]
    gathered = sum(padded) - sum(persistent)
    again = sum(_ceil(n, ranks) * ranks for n in tensors.reused if n > threshold)
    keeps = stage3_keeps(tensors, zero)
    # the first micro-step records the order of modules: persistent tensors are not whole yet, nothing is kept
    recorded, steady = (1, accumulation - 1) if first else (0, accumulation)
    recording = recorded * s * (sum(padded) + again)
    if keeps == "all":
        why = {"forward": "weights, kept from forward to backward", "backward": ""}
        sent = {"forward": recording + steady * s * gathered, "backward": recording}
    else:
        bound = "" if keeps == "none" else " (at most: some stay within the live and reuse limits)"
        why = dict.fromkeys(("forward", "backward"), "weights, freed after each use" + bound)
        sent = dict.fromkeys(why, recording + steady * s * (gathered + again))
    if recorded and steady:                                  # the second micro-step gathers the persistent ones to stay
        sent["forward"] += s * sum(persistent)
    note = "; all of them in the first micro-step, which records the order of modules" if first else ""
    rows = [Collective("all_gather", phase, None, sent[phase], (why[phase] + note).removeprefix("; "))
            for phase in sent if sent[phase]]
    reduced = sum(padded)
    rows.append(Collective("reduce_scatter", "backward", accumulation * len(buckets(tensors.numels[::-1], size)),
                           accumulation * s * reduced, "gradients, at each micro-step"))
    if persistent:
        rows.append(Collective("all_gather", "step", len(persistent), s * sum(persistent), "persistent parameters"))
    groups = len(_sub_groups([p // ranks for p in padded], zero.get("sub_group_size", 10**9)))
    rows.append(Collective("all_reduce", "step", groups, (4 if offload != "none" else 8) * groups,
                           "norm of the gradients, one for each sub-group"))
    return rows
