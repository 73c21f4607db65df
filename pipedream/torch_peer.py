"""torch.distributed.pipelining on the same parts: a schedule of ours as a table that torch executes, and torch's own 1F1B as a peer.

    python pipedream/torch_peer.py schedule=zb_h1              # writes the CSV, lets torch run it on 2 ranks, compares gradients

torch ships no ZB-H1, ZB-H2 or Hanayo; a table of operations is all its runtime needs, so that it checks ours independently.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yardstick import program, schedules
from yardstick.settings import Choice, Either, SettingsError
from yardstick.shapes import ModelShape

# what torch's runtime can hold: one micro-batch order for all, and no part on two ranks
RUNNABLE = [name for name in schedules.NAMES if not name.startswith("pipedream") and name not in ("dualpipe", "chimera")]

CONFIG = {
    "schedule": Choice("zb_h1", *(name for name in RUNNABLE if name != "zb_h1")),
    "chunks": Either(int),                # model parts of a rank; None: the fewest that the schedule takes
    "micro_batches": 4,                   # of the step
    "micro_batch": 2,                     # sequences in one
    "layers": 4,                          # of the GPT, yardstick/model.py
    "hidden": 32,                         # its width
    "heads": 2,                           # of its attention
    "seq": 16,                            # tokens of a sequence
    "record": Either(str),                # LABEL: keep the record in results/LABEL/pipedream
    "output": Either(str),                # folder of the run, for the CSV
}


def csv(schedule):
    """The schedule as torch's `compute_only` CSV: a row per rank, cells like 3F7, part F micro-batch."""
    return "".join(",".join(f"{schedule.stage_of[rank][op.chunk]}{op.kind}{op.micro_batch}" for op in ops) + "\n"
                   for rank, ops in enumerate(schedule))


def runtime(schedule, modules, rank, count, path):
    """torch's runtime for a schedule of ours. modules: {part: nn.Module} of this rank."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    from yardstick.model import loss_of
    stages = [PipelineStage(module, part, schedule.model_parts, rank.device) for part, module in modules.items()]
    owner = {part: other for other, parts in enumerate(schedule.stage_of) for part in parts}
    for stage in stages:
        stage.stage_index_to_group_rank = owner
    found = _PipelineScheduleRuntime(stages, count, loss_fn=loss_of)
    found.stage_index_to_group_rank = owner
    found._load_csv(str(path), format="compute_only")
    return found


def step(run, modules, last, tokens):
    """One forward and backward of a torch schedule -> mean loss of the micro-batches on the rank of the last part, else None."""
    losses = []
    arguments = [tokens] if 0 in modules else []
    if last in modules:
        run.step(*arguments, target=tokens, losses=losses)
        return sum(loss.item() for loss in losses) / len(losses)
    run.step(*arguments)


def check(run):
    settings = run.settings
    try:
        schedule = schedules.build(settings["schedule"], run.world, settings["micro_batches"], settings["chunks"])
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if schedule.model_parts > settings["layers"]:
        raise SettingsError(f"{schedule.model_parts} model parts need as many layers; layers={settings['layers']}.")


def train(run):
    """One rank: a step by torch's runtime on our table, then the same by one process, and how far the gradients lie apart."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from pipedream.pipedream_simple import cut
    from yardstick.model import layers, loss_of
    settings, rank = run.settings, run.join(120, deepspeed=False)
    schedule = schedules.build(settings["schedule"], run.world, settings["micro_batches"], settings["chunks"])
    shape = ModelShape(settings["layers"], settings["hidden"], settings["heads"], 256, settings["seq"], tied=False)
    parts = cut(layers(shape, torch.float64, seed=1), schedule.model_parts)
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / f"{settings['schedule']}_{rank.rank}.csv"
    path.write_text(csv(schedule))
    modules = {part: nn.Sequential(*parts[part]).to(rank.device) for part in schedule.stage_of[rank.rank]}
    tokens = torch.randint(256, (settings["micro_batches"] * settings["micro_batch"], settings["seq"]),
                           generator=torch.Generator().manual_seed(1)).to(rank.device)
    loss = step(runtime(schedule, modules, rank, settings["micro_batches"], path), modules, schedule.model_parts - 1, tokens)
    everyone = [None] * run.world
    dist.all_gather_object(everyone, ({part: [weight.grad.cpu() for weight in module.parameters()] for part, module in modules.items()}, loss))
    if rank.rank:
        return
    alone = [layer.cpu() for part in cut(layers(shape, torch.float64, seed=1), schedule.model_parts) for layer in part]
    for rows in tokens.cpu().chunk(settings["micro_batches"]):
        (loss_of(nn.Sequential(*alone)(rows), rows) / settings["micro_batches"]).backward()
    gradients = {part: values for each, _ in everyone for part, values in each.items()}
    mine = [gradient for part in sorted(gradients) for gradient in gradients[part]]
    apart = max(float((a - weight.grad).abs().max()) for a, weight in zip(mine, (w for layer in alone for w in layer.parameters())))
    loss = next(each for _, each in everyone if each is not None)
    print(f"torch ran our {schedule.name} on {run.world} ranks, {sum(map(len, schedule))} operations: loss {loss:.4f}, gradients differ from one "
          f"process by {apart:.1e} at most; table: {os.path.relpath(path)}")
    run.record(rank, {"gradients_apart_ratio_max": apart, "loss_nats": loss, "operations_count": sum(map(len, schedule))})


if __name__ == "__main__":
    program.main(__file__, CONFIG, train, check)
