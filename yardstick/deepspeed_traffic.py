"""What DeepSpeed 0.19 really sends in one step, from a config and the list of a model's tensors, to the byte.

`formulas.zero_traffic_in_parameters` is the paper. This is the release: all-reduce where the paper has reduce-scatter, at
each micro-step under stage 2, and gathers that depend on what stage 3 keeps. Sources are modules of the package deepspeed.
"""

from dataclasses import dataclass

from yardstick.deepspeed_memory import ceil_div, element_bytes, partition_bounds, sections, sub_groups

FALLBACK_BUCKET = 500_000_000     # elements; runtime/engine.py: DeepSpeedEngine.buffered_allreduce_fallback


@dataclass(frozen=True)
class Collective:
    """What one rank takes part in per optimizer step: payload is the bytes of the full tensors."""

    kind: str
    phase: str             # forward, backward, step
    calls: int | None      # None: depends on the order of modules, on prefetching, or on how a tensor larger than
                           # the bucket is cut
    payload_bytes: int
    why: str
    exact: bool = True     # False: payload_bytes is an upper bound


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
    zero, stage, offload, _ = sections(config)
    s, n = element_bytes(config), tensors.count
    clip = config.get("gradient_clipping", 1.0) > 0
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
        # without it each owner's part of a bucket is reduced to that owner
        whole = zero.get("use_multi_rank_bucket_allreduce", True) or not zero.get("reduce_scatter", True)
        rows.append(Collective("all_reduce" if whole else "reduce", "backward", calls if whole else None, times * s * n,
                               ("gradients, whole buckets to every rank" if whole else "gradients, each part to its owner")
                               + (", at each micro-step" if stage == 2 else ", at the last micro-step")))
        rows.append(Collective("all_gather", "step", 1, s * partition_bounds(tensors, ranks, 0)[2], "updated weights"))
        rows.append(Collective("all_reduce", "step", 1, 4, "norm of the gradients"))
        if s == 2:
            rows.append(Collective("all_reduce", "step", 1, 1, "overflow flag"))
    else:
        rows += _stage3(tensors, zero, s, ranks, accumulation, offload, size, first)
    return rows


def stage3_keeps(tensors, zero):
    """"all" when gathered parameters stay until the end of backward, "none" when each is freed after use, else "some".

    runtime/zero/partitioned_param_coordinator.py: a parameter is kept when its next use lies within max_reuse_distance
    elements (from the first layer's forward to its backward that is twice the model), or when prefetching has already
    looked past that use; max_live_parameters limits prefetching alone.
    """
    reuse = zero.get("stage3_max_reuse_distance", 10**9)
    prefetch = min(zero.get("stage3_max_live_parameters", 10**9), zero.get("stage3_prefetch_bucket_size", 5 * 10**7))
    if reuse >= 2 * (tensors.count + sum(tensors.reused)):
        return "all"
    return "none" if reuse == 0 and prefetch == 0 else "some"


def _stage3(tensors, zero, s, ranks, accumulation, offload, size, first):
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    padded = [ceil_div(n, ranks) * ranks for n in tensors.numels]
    persistent = [p for n, p in zip(tensors.numels, padded) if n <= threshold]
    gathered = sum(padded) - sum(persistent)
    again = sum(ceil_div(n, ranks) * ranks for n in tensors.reused if n > threshold)
    keeps = stage3_keeps(tensors, zero)
    # the first micro-step records the order of modules: persistent tensors are not whole yet, nothing is kept
    recorded, steady = (1, accumulation - 1) if first else (0, accumulation)
    recording = recorded * s * (sum(padded) + again)
    if keeps == "all":
        why = {"forward": "weights, kept from forward to backward", "backward": ""}
        sent = {"forward": recording + steady * s * gathered, "backward": recording}
    else:
        bound = "" if keeps == "none" else " (at most: some stay within the limits)"
        why = dict.fromkeys(("forward", "backward"), "weights, freed after each use" + bound)
        sent = dict.fromkeys(why, recording + steady * s * (gathered + again))
    if recorded and steady:                                  # the second micro-step gathers the persistent ones to stay
        sent["forward"] += s * sum(persistent)
    note = "; all of them in the first micro-step, which records the order of modules" if first else ""
    rows = [Collective("all_gather", phase, None, sent[phase], (why[phase] + note).removeprefix("; "), keeps != "some")
            for phase in sent if sent[phase]]
    reduced = sum(padded)
    rows.append(Collective("reduce_scatter", "backward", accumulation * len(buckets(tensors.numels[::-1], size)),
                           accumulation * s * reduced, "gradients, at each micro-step"))
    if persistent:
        rows.append(Collective("all_gather", "step", len(persistent), s * sum(persistent), "persistent parameters"))
    groups = len(sub_groups([p // ranks for p in padded], zero.get("sub_group_size", 10**9)))
    rows.append(Collective("all_reduce", "step", groups, (4 if offload != "none" else 8) * groups,
                           "norm of the gradients, one for each sub-group"))
    return rows
