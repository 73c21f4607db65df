"""The end of a run: what every rank counted is gathered, put beside both formulas, told, and recorded."""

import dataclasses
import json
import math
import shutil
from collections import defaultdict

from yardstick import deepspeed_memory, deepspeed_traffic, formulas, hardware, ledger, ranks, report_text, results
from yardstick.shapes import FP32, MIXED

CONTROL_BYTES = 64             # tensors up to this are scalars: norms, flags, counters


def finish(plan, rank, engine, probe, meter, history, matmul, evaluation, sample):
    """Gather what every rank counted, print the report, write record and figure. Collective; rank 0 writes."""
    import torch
    mine = {"moments": {moment: ([vars(row) for row in rows], unnamed) for moment, (rows, unnamed) in probe.moments.items()},
            "activations": probe.activations, "traffic": meter.per_step(max(1, probe.counted_steps()), rank.world),
            "kernels": probe.kernel_seconds, "seconds": {phase: probe.median(phase) for phase in probe.seconds},
            "peak_allocated": torch.cuda.max_memory_allocated() if rank.gpu else None}
    everyone = [None] * rank.world
    torch.distributed.all_gather_object(everyone, mine)
    if plan.swap:
        torch.distributed.barrier()                      # every rank has read its files' sizes
        shutil.rmtree(plan.swap, ignore_errors=True)
    if rank.rank:
        return
    summary = summarise(plan, everyone, history, evaluation, first=probe.first == 0)
    text = report_text.text_of(plan, summary, history, evaluation, sample)
    path = write_record(plan, summary, history, matmul, sample, text)      # first: what is printed to may be closed
    if not plan.brief:
        print(text)
    if plan.brief:
        print(f"loss {history[-1]:.6f} after {len(history)} steps, {1e3 * summary['measured']['step_seconds_median']:.0f} ms each",
              flush=True)
        return
    from yardstick import figures
    figure = plan.folder / "figure.png"
    plan.folder.mkdir(parents=True, exist_ok=True)
    figures.run_figure(json.loads(path.read_text()), figure)
    root = results.ROOT
    shown = [p.relative_to(root) if p.is_relative_to(root) else p for p in (path, figure)]
    print(f"\nrecord: {shown[0]}\nfigure: {shown[1]}", flush=True)


def summarise(plan, everyone, history, evaluation, first=False):
    """What the report says, as numbers: {"memory", "differences", "traffic", "measured", "predicted", "estimated"}."""
    memory, measured, predicted, estimated = {}, {}, {}, {}
    stage = plan.config["zero_optimization"].get("stage", 0)
    recipe = FP32 if plan.precision == "fp32" else MIXED
    paper = formulas.zero_state_bytes_by_kind(params=plan.tensors.count, ranks=plan.world, stage=stage, recipe=recipe)
    items = [deepspeed_memory.memory(plan.tensors, plan.config, ranks=plan.world, rank=r, accumulation=plan.accumulation)
             for r in range(plan.world)]
    unnamed = 0
    for moment in ("always",) if first else ("gradients", "always"):     # Adam's moments come with the first update
        counted = [ledger.totals([ledger.Row(**row) for row in one["moments"][moment][0]]) for one in everyone
                   if one["moments"]]
        if not counted:
            break
        memory["after_backward" if moment == "gradients" else "rest"] = {
            "measured": _largest(counted), "predicted": _largest([deepspeed_memory.by_kind(i, moment) for i in items]),
            "paper": {k: v for k, v in paper.items() if v and (moment == "gradients" or k != "gradient")}}
        # the batch, the loss and DeepSpeed's scalars have no owner; anything larger would be a hole in the ledger
        unnamed = max([unnamed] + [nbytes for one in everyone for shape, _, nbytes in one["moments"][moment][1]
                                   if shape and list(shape)[-2:] != [plan.micro_batch, plan.seq] and nbytes > CONTROL_BYTES])
    for moment, prefix in (("after_backward", ""), ("rest", "rest_")):
        for name, sums in (("measured", measured), ("predicted", predicted)):
            for place, nbytes in _by_place(memory.get(moment, {}).get(name, {})).items():
                sums[f"{prefix}{place}_bytes"] = nbytes
    if memory:
        measured["unnamed_bytes"] = unnamed

    rows = everyone[0]["traffic"]
    for row in rows:                      # a set-up of stage 3 whose size depends on names of modules: told apart, not predicted
        if stage == 3 and row["kind"] == "broadcast":
            row["what"] = "start-up"
    own = [row for row in rows if not row["what"]]
    expected = deepspeed_traffic.traffic(plan.tensors, plan.config, ranks=plan.world, accumulation=plan.accumulation,
                                          first=first)
    if plan.settings["activation_checkpointing"] and any(c.phase == "backward" and c.kind == "all_gather" for c in expected):
        expected = [dataclasses.replace(c, exact=False, why=c.why + "; recomputation gathers part of them again")
                    if (c.kind, c.phase) == ("all_gather", "backward") else c for c in expected]
    exact = all(c.exact for c in expected)
    if memory:
        measured["payload_bytes"] = sum(row["payload_bytes"] for row in own)
        measured["ring_bytes"] = sum(row["ring_bytes"] for row in own)
        if exact:
            predicted["payload_bytes"] = sum(c.payload_bytes for c in expected)
            predicted["ring_bytes"] = sum(formulas.ring_bytes(c.kind, c.payload_bytes, plan.world) for c in expected)
    seconds = {phase: max(one["seconds"][phase] for one in everyone) for phase in everyone[0]["seconds"]}
    for phase, key in (("total", "step_seconds_median"), ("data", "data_seconds"), ("forward", "forward_seconds"),
                       ("backward", "backward_seconds"), ("step", "optimizer_seconds")):
        measured[key] = seconds[phase]
    if not plan.gpu:
        measured["communication_seconds"] = seconds["communication"]
    elif everyone[0]["kernels"] is not None:
        measured["communication_seconds"] = max(one["kernels"] for one in everyone)
    measured["tokens_per_second"] = plan.global_batch * plan.seq / seconds["total"]
    measured["epoch_seconds"] = len(plan.corpus.train) / measured["tokens_per_second"]
    measured["loss_nats"] = history[-1]
    if evaluation is not None:
        measured["evaluation_loss_nats"] = evaluation
    if everyone[0]["activations"] is not None:
        measured["activation_bytes"] = max(one["activations"] for one in everyone)
        if plan.shape is not None:
            estimated["activation_bytes"] = formulas.saved_bytes(
                plan.shape, micro_batch=plan.micro_batch, seq=plan.seq, element_bytes=recipe.parameter,
                recompute="full" if plan.settings["activation_checkpointing"] else "none")
    if plan.gpu:
        measured["peak_allocated_bytes"] = max(one["peak_allocated"] for one in everyone)
        peak = hardware.peak_flops(ranks.gpu_name(), plan.precision)
        if peak and plan.shape is not None:
            flops = formulas.train_flops(dataclasses.replace(plan.shape, seq=plan.seq), plan.global_batch)
            measured["model_flops_utilisation_fraction"] = flops / seconds["total"] / plan.world / peak
    return {"memory": memory, "items": items[0], "paper": paper, "traffic": rows, "expected": expected, "exact": exact, "stage": stage,
            "measured": {k: v for k, v in measured.items() if v or k in ("unnamed_bytes",)}, "predicted": {
                k: v for k, v in predicted.items() if v}, "estimated": estimated,
            "loss": history, "differences": deepspeed_memory.differences(items[0], paper)}


def _largest(sums):
    """For each key the largest value over ranks."""
    return {key: max(one.get(key, 0) for one in sums) for key in sorted({k for one in sums for k in one})}


def _by_place(kinds):
    """{"parameter@host": bytes} as sums by kind and by place: parameter, ..., device, host, nvme."""
    sums = defaultdict(int)
    for key, nbytes in kinds.items():
        kind, _, place = key.partition("@")
        sums[kind] += nbytes
        sums[place or "device"] += nbytes
    return sums


def write_record(plan, summary, history, matmul, sample, text):
    """Write the run's JSON and return its path: results/LABEL/strategies/N.json with record=LABEL, else the run's folder."""
    memory, settings = summary["memory"], dict(plan.settings)
    settings.update(precision=plan.precision, global_batch=plan.global_batch, micro_batch=plan.micro_batch,
                    accumulation=plan.accumulation, seq=plan.seq)
    for key in ("record", "output", "nvme_path"):
        settings.pop(key)                               # where it was written says nothing about the run
    traffic = {name: {} for name in ("measured", "predicted")}
    for row in summary["traffic"]:
        if not row["what"]:
            traffic["measured"][row["kind"]] = traffic["measured"].get(row["kind"], 0) + row["ring_bytes"]
    for row in summary["expected"]:
        ring = formulas.ring_bytes(row.kind, row.payload_bytes, plan.world)
        traffic["predicted"][row.kind] = traffic["predicted"].get(row.kind, 0) + ring
    element = 4 if plan.precision == "fp32" else 2
    traffic["weights_bytes"] = plan.tensors.count * element
    config = json.loads(json.dumps(plan.config))
    for key in ("offload_optimizer", "offload_param"):
        (config["zero_optimization"].get(key) or {}).pop("nvme_path", None)
    details = {"memory": memory, "traffic": traffic, "collectives": summary["traffic"], "loss": history, "sample": sample,
               "differences": [{"name": name, "bytes": nbytes} for name, nbytes in summary["differences"]],
               "config": config, "matmul_precision": matmul, "notes": plan.notes, "parameters": plan.tensors.count,
               "report": text.splitlines()}
    machine = {"accelerator": ranks.gpu_name() if plan.gpu else "none", "ranks": plan.world}
    broken = next((step for step, loss in enumerate(history, 1) if not math.isfinite(loss)), None)
    if broken:                                           # JSON has no NaN: what is not a number is a missing one
        details["loss"] = [loss if math.isfinite(loss) else None for loss in history]
        summary["measured"] = {k: v for k, v in summary["measured"].items() if math.isfinite(v)}
    return results.write(plan.run, outcome=f"diverged: loss not finite from step {broken}" if broken else "ok",
                         settings=settings, measured=summary["measured"], predicted=summary["predicted"],
                         estimated=summary["estimated"], details=details, machine=machine, command=plan.command,
                         label=plan.settings["record"], folder=plan.folder)
