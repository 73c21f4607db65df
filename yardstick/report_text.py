"""The report of a run in words: what was held and sent, beside both formulas, and where the time went."""

import math
from collections import defaultdict

from yardstick import deepspeed_traffic, formulas, ledger

KIND_NAMES = {"parameter": "weights", "gradient": "gradients", "master": "fp32 master", "optimizer": "Adam's moments",
              "buffer": "buffers"}
OWN = {"control": "this program's own: the mean loss, the flags to stop and to skip", "start-up": "the order of modules, compared between ranks in the first steps"}


def text_of(plan, summary, history, evaluation, sample):
    """The report as text."""
    lines = ["", f"== {plan.settings['strategy']} on {plan.world} rank{'s' if plan.world > 1 else ''}: what it measured =="]
    lines.append(f"loss {history[0]:.4f} -> {history[-1]:.4f} in {len(history)} step{'s' if len(history) > 1 else ''}"
                 + (f"; held-out text {evaluation:.4f} nats per token" if evaluation is not None else ""))
    if not all(map(math.isfinite, history)):
        lines.append("the loss is not finite: the run diverged. Try a smaller learning_rate, or gradient_clipping=1.0.")
    if sample:
        lines.append(f"sample: {sample!r}")
    measured = summary["measured"]
    if summary["memory"]:
        lines += ["", *_memory_lines(plan, summary), "", *_traffic_lines(plan, summary)]
    lines += ["", *_time_lines(plan, measured)]
    return "\n".join(lines)


def _mb(nbytes):
    return f"{nbytes / 1e6:,.2f}" if nbytes else "-"


def _memory_lines(plan, summary):
    device = "GPU" if plan.gpu else "device (RAM here)"
    names = {"": device, "host": "host", "nvme": "NVMe files"}
    lines = [f"Held by each rank, MB = 10^6 bytes, the largest over ranks (P = {plan.tensors.count:,} parameters x "
             f"{2 if plan.precision != 'fp32' else 4} bytes):",
             f"  {'':15}{'':18}{'after backward':>28}{'at rest':>24}",
             f"  {'what':15}{'where':18}{'counted':>10}{'predicted':>10}{'paper':>8}{'counted':>12}{'predicted':>12}"]
    rest = summary["memory"]["rest"]
    after = summary["memory"].get("after_backward", {"measured": {}, "predicted": {}, "paper": {}})
    keys = sorted(set(after["measured"]) | set(rest["measured"]) | set(after["predicted"]),
                  key=lambda k: (ledger.KINDS.index(k.partition("@")[0]), k))
    printed = set()
    for key in keys:
        kind, _, place = key.partition("@")
        paper = after["paper"].get(kind, 0) if kind not in printed else 0
        printed.add(kind)
        lines.append(f"  {KIND_NAMES[kind]:15}{names[place]:18}{_mb(after['measured'].get(key, 0)):>10}"
                     f"{_mb(after['predicted'].get(key, 0)):>10}{_mb(paper):>8}"
                     f"{_mb(rest['measured'].get(key, 0)):>12}{_mb(rest['predicted'].get(key, 0)):>12}")
    total = [sum(part.values()) for part in (after["measured"], after["predicted"], after["paper"], rest["measured"],
                                             rest["predicted"])]
    lines.append(f"  {'all':15}{'':18}{_mb(total[0]):>10}{_mb(total[1]):>10}{_mb(total[2]):>8}{_mb(total[3]):>12}{_mb(total[4]):>12}")
    off = max(sum(abs(part["measured"].get(key, 0) - part["predicted"].get(key, 0)) for key in keys)
              / sum(part["predicted"].values()) for part in summary["memory"].values())
    lines.append(f"  counted and predicted differ by {100 * off:.3f} %; live tensors without a name, but the batch and scalars: "
                 f"{summary['measured']['unnamed_bytes']} bytes")
    if len(summary["loss"]) == 1:
        lines.append("  after backward: not shown for a run of one step, whose update makes Adam's moments; take steps=2 or more")
    elif summary["differences"]:
        lines.append("  what this release holds beyond (+) or less than (-) the ZeRO paper's formula, on rank 0 after backward:")
        lines += [f"    {'+' if nbytes > 0 else '-'}{_short(abs(nbytes)):>10}  {name}" for name, nbytes in summary["differences"]]
    if "activation_bytes" in summary["measured"]:
        lines.append(f"  activations saved by one forward, at their peak: {_mb(summary['measured']['activation_bytes'])} counted"
                     + (f", {_mb(summary['estimated']['activation_bytes'])} estimated" if summary["estimated"] else ""))
    if plan.gpu:
        lines.append(f"  largest allocation of the GPU's allocator: {_mb(summary['measured']['peak_allocated_bytes'])}")
    return lines


def _traffic_lines(plan, summary):
    world, element = plan.world, (4 if plan.precision == "fp32" else 2)
    weights = plan.tensors.count * element
    lines = ["Sent in one step (payload: the full tensors; ring: what one rank sends for them), MB:",
             f"  {'collective':16}{'phase':10}{'calls':>7}{'payload':>10}{'predicted':>11}{'ring':>9}  why"]
    if world == 1:
        return lines[:1] + ["  nothing: one rank has nobody to send to"]
    expected, counted = defaultdict(lambda: [0, []]), defaultdict(float)
    for row in summary["expected"]:
        expected[row.kind, row.phase][0] += row.payload_bytes
        expected[row.kind, row.phase][1].append(row.why)
    for row in summary["traffic"]:
        key = (row["kind"], row["phase"])
        size, why = (None, [OWN[row["what"]]]) if row["what"] else expected.get(key, (0, ["not predicted"]))
        counted[key] += 0 if row["what"] else row["payload_bytes"]
        lines.append(f"  {row['kind']:16}{row['phase']:10}{row['calls']:>7.4g}{_short(row['payload_bytes']):>10}"
                     f"{'-' if size is None else _short(size):>11}{_short(row['ring_bytes']):>9}  {'; '.join(why)}")
    for (kind, phase), (size, why) in expected.items():
        if (kind, phase) not in counted:
            lines.append(f"  {kind:16}{phase:10}{0:>7}{'-':>10}{_short(size):>11}{'-':>9}  {'; '.join(why)}")
    measured, predicted = summary["measured"], summary["predicted"]
    unit = formulas.ring_bytes("all_gather", weights, world)       # P passed once around the ring
    paper = formulas.zero_traffic_in_parameters(summary["stage"])
    unexplained = sum(abs(counted[key] - expected[key][0]) for key in {*counted, *expected})
    lines.append(f"  ring traffic of the strategy: {measured['ring_bytes'] / unit:.3f} P counted, " + (
        f"{predicted['ring_bytes'] / unit:.3f} P predicted, {paper} P in the paper; unexplained: {unexplained:,.0f} bytes"
        if summary["exact"] else f"{paper} P in the paper; the gathers of weights are not predicted exactly, see their rows"))
    lines.append(f"  {_why_not_the_paper(plan, summary)}")
    return lines


def _short(nbytes):
    return f"{nbytes:.0f} B" if nbytes < 10_000 else f"{nbytes / 1e6:,.2f}"


def _why_not_the_paper(plan, summary):
    stage, times = summary["stage"], plan.accumulation
    if stage == 0:
        return "an all-reduce is a reduce-scatter and an all-gather: 2 P, once a step, as in the paper."
    if stage in (1, 2):
        whole = any(c.kind == "all_reduce" and c.phase == "backward" for c in summary["expected"])
        return ("the paper reduce-scatters gradients (1 P) and gathers weights (1 P); this release "
                + ("all-reduces whole buckets (2 P)" if whole else "reduces each owner's part to it (1 P)")
                + (f" at each of {times} micro-steps" if stage == 2 and times > 1 else "") + ", then gathers (1 P).")
    if len(summary["loss"]) == 1:
        return "a first step, in which stage 3 records the order of modules and keeps nothing; take steps=3 or more for the usual one."
    keeps = deepspeed_traffic.stage3_keeps(plan.tensors, plan.config["zero_optimization"])
    return {"all": "weights gathered in forward stay until backward (twice the model lies within max_reuse_distance): 2 P for each "
                   "micro-step, where the paper gathers twice; max_reuse_distance=0 max_live=0 shows its 3 P.",
            "none": "weights are freed after each use and gathered again in backward: the paper's 3 P for each micro-step, and "
                    "tied tensors once more for each further use.",
            "some": "part of the weights stays gathered between forward and backward (max_reuse_distance, and prefetching, which "
                    "max_live limits): between 2 P and 3 P for each micro-step."}[keeps]


def _time_lines(plan, measured):
    total = measured["step_seconds_median"]
    parts = [("data", "data_seconds"), ("forward", "forward_seconds"), ("backward", "backward_seconds"),
             ("communication", "communication_seconds"), ("optimizer", "optimizer_seconds")]
    shown = ", ".join(f"{name} {1e3 * measured[key]:.1f}" for name, key in parts if key in measured)
    lines = [f"Time of a step: {1e3 * total:.1f} ms in the median, {measured['tokens_per_second']:,.0f} tokens/s"
             f" (ms: {shown}; slowest rank of each)"]
    if not plan.gpu:
        lines.append("  communication is the time the host was blocked in it, and is not in the other parts; a CPU's times say nothing "
                     "about a GPU's")
    elif "communication_seconds" in measured:
        lines.append("  communication is the time of its kernels in one profiled step; they may run beside computation and are in the "
                     "other parts too")
    if "model_flops_utilisation_fraction" in measured:
        lines.append(f"  model FLOPs utilisation {100 * measured['model_flops_utilisation_fraction']:.1f} % (attention in full, "
                     "recomputation not counted, of the dense peak of the precision)")
    return lines
