"""Trains a GPT through a pipeline of real processes: PipeDream's asynchronous modes, and every schedule that flushes.

    python pipedream/pipedream_simple.py                              # 1F1B with weight stashing, on two CPU processes
    RANKS=4 python pipedream/pipedream_simple.py mode=vertical_sync steps=50
    RANKS=4 python pipedream/pipedream_simple.py mode=zb_v micro_batches=8 layers=8
    RANKS=4 python pipedream/pipedream_simple.py replicas=3,1 micro_batches=6
    torchrun --nproc_per_node=2 pipedream/pipedream_simple.py mode=flush

Each rank holds a part of the model, or several, and interprets its list of operations (yardstick/schedules.py). The run ends with a
comparison to one process that makes the same updates with the same delays, and with the versions that each stage kept.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yardstick import program, schedules
from yardstick.schedules import Op
from yardstick.settings import Choice, Either, SettingsError
from yardstick.shapes import ModelShape

ASYNCHRONOUS = {"stash": "pipedream", "naive": "pipedream", "vertical_sync": "pipedream", "2bw": "pipedream_2bw"}
FLUSHING = [name for name in schedules.NAMES if not name.startswith("pipedream") and name not in ("1f1b", "gpipe")]

CONFIG = {
    "mode": Choice("stash", "naive", "vertical_sync", "2bw", "flush", "gpipe", *FLUSHING),   # stash, naive, vertical_sync: an update
                                          # per micro-batch; 2bw: per micro_batches, one update late; flush: 1F1B; the rest: as named
    "replicas": Either(str),              # ranks of each stage, "3,1"; stash, naive, vertical_sync and flush
    "chunks": Either(int),                # model parts of a rank, where the schedule takes several
    "steps": 20,                          # each of micro_batches; asynchronous modes update in between
    "micro_batches": 8,                   # of one step
    "micro_batch": 2,                     # sequences in one
    "layers": 4,                          # of the GPT, yardstick/model.py
    "hidden": 64,                         # its width
    "heads": 4,                           # of its attention
    "seq": 64,                            # tokens of a sequence
    "learning_rate": 0.3,                 # of plain SGD
    "dtype": Choice("float32", "float64"),
    "seed": 1,                            # of weights and of the order of data
    "pad_seconds": 0.0,                   # the least an F, I or W lasts (B: twice), for timelines on machines with few cores
    "check": True,                        # compare with one process at the end (it computes everything once more)
    "timeout_seconds": 120.0,             # the longest that a rank waits for another
    "record": Either(str),                # LABEL: keep the record in results/LABEL/pipedream
    "output": Either(str),                # folder of the run
}


def one_f_one_b(stages, micro_batches, stage):
    """1F1B of one stage, as PipeDream runs it: forwards until the first gradient is there, then one backward for each forward."""
    warm = min(stages - 1 - stage, micro_batches)
    order = [Op("F", k) for k in range(warm)]
    for k in range(micro_batches - warm):
        order += [Op("F", warm + k), Op("B", k)]
    return order + [Op("B", k) for k in range(micro_batches - warm, micro_batches)]


def schedule_of(settings, world):
    """The schedule of a run: all of its micro-batches in one pass where nothing flushes, else those of a step."""
    mode, count = settings["mode"], settings["micro_batches"]
    replicas = [int(n) for n in settings["replicas"].split(",")] if settings["replicas"] else None
    name = ASYNCHRONOUS.get(mode, "1f1b" if mode == "flush" else mode)
    passes = settings["steps"] if mode in ASYNCHRONOUS else 1
    schedule = schedules.build(name, len(replicas) if replicas else world, count * passes, settings["chunks"], replicas)
    if mode == "2bw":
        schedule.per_update = count
    return schedule


def shape_of(settings, vocab):
    return ModelShape(settings["layers"], settings["hidden"], settings["heads"], vocab, settings["seq"], tied=False)


def cut(layers, parts):
    """[[layer]] of each part: the blocks as evenly as can be, the embedding before the first, the head behind the last."""
    blocks, found, place = len(layers) - 2, [], 1
    for part in range(parts):
        count = blocks // parts + (part < blocks % parts)
        found.append(layers[place:place + count])
        place += count
    found[0] = [layers[0], *found[0]]
    found[-1] = [*found[-1], layers[-1]]
    return found


def check(run):
    """Refuse what cannot run, before any rank starts."""
    settings = run.settings
    if settings["replicas"] and not all(n.strip().isdecimal() and int(n) for n in settings["replicas"].split(",")):
        raise SettingsError(f"replicas={settings['replicas']} must be whole numbers from 1, joined by commas: replicas=3,1.")
    for key in ("steps", "micro_batches", "micro_batch", "layers", "seq", "timeout_seconds"):
        if settings[key] <= 0:
            raise SettingsError(f"{key}={settings[key]} must be above zero.")
    try:
        schedule = schedule_of(settings, run.world)
        shape_of(settings, 4096)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if len(schedule) != run.world:
        raise SettingsError(f"replicas={settings['replicas']} need {len(schedule)} ranks, and there are {run.world}. Set RANKS={len(schedule)}.")
    if schedule.model_parts > settings["layers"]:
        raise SettingsError(f"{schedule.model_parts} model parts need as many layers, and layers={settings['layers']}. Give layers="
                            f"{schedule.model_parts}, fewer ranks" + (", or fewer chunks." if schedule.chunks > 1 else "."))
    if settings["mode"] == "2bw" and settings["micro_batches"] < run.world:
        raise SettingsError(f"2bw needs micro_batches of at least the stages, {run.world}; micro_batches={settings['micro_batches']}. Fewer would need "
                            "a third version of the weights (arXiv 2006.09503, section 3.1).")
    if any(settings["micro_batches"] * (settings["steps"] if settings["mode"] in ASYNCHRONOUS else 1) % n for n in schedule.replicas):
        raise SettingsError(f"micro_batches={settings['micro_batches']} must be a multiple of the replicas of each stage, {settings['replicas']}.")
    from pipedream.messages import check_order
    check_order(schedule)


def interpret(schedule, rank, stages, messages, tokens, semantics, settings, events, tell):
    """Run this rank's list of operations once. tokens: [micro-batch, B, T]; tell(micro-batch, loss) where the model's last part is.

    events gets (kind, micro-batch, chunk, start, end, version) of each operation; what no event covers is waiting.
    """
    import torch

    from pipedream.simulator import versions
    last, local = schedule.model_parts - 1, {}
    for (kind, k, chunk), version in zip(schedule[rank.rank], versions(schedule, semantics)[rank.rank]):
        part, stage, into = schedule.stage_of[rank.rank][chunk], stages[chunk], None
        before, behind = (part - 1, part + 1) if kind == "F" else (part + 1, part - 1)
        way = "F" if kind == "F" else "B"
        if kind != "W" and 0 <= before <= last:
            message = way, before, k
            into = local.pop(message) if message in local else messages.receive(message)
        version = stage.newest if semantics == "flush" else version         # a pass is one step of a run
        begun = time.perf_counter()
        if kind == "F":
            out = stage.forward(k, tokens[k] if part == 0 else into, version, tokens[k] if part == last else None)
            if part == last:
                tell(k, out.item())
        elif kind == "W":
            stage.weights(k)
        else:                                               # a step's loss is the mean of its micro-batches, and so is its gradient
            out = stage.backward(k, into, split=kind == "I", scale=1 / settings["micro_batches"] if semantics in ("flush", "2bw") else 1.0)
        if kind == "B" and semantics != "flush":
            update(stage, schedule, k, version, semantics)
        if rank.gpu:
            torch.cuda.synchronize()
        spare = settings["pad_seconds"] * (2 if kind == "B" else 1) - (time.perf_counter() - begun)
        if spare > 0:
            time.sleep(spare)
        events.append((kind, k, chunk, begun, time.perf_counter(), version))
        if kind != "W" and 0 <= behind <= last:
            message = way, part, k
            if message in messages.out:
                messages.send(message, out)
            else:
                local[message] = out                        # the next part is on this rank
    messages.finish()


def update(stage, schedule, k, version, semantics):
    """The asynchronous update after the backward of micro-batch k, whose forward took the weights `version`.

    w(t+1) = w(t) - rate * gradient(w(version)); 2BW waits for the gradients of a step.
    """
    if semantics == "2bw":
        if (k + 1) % schedule.per_update == 0:
            stage.update(stage.take_gradients(version), keep_from=stage.newest)     # the next step still begins from the newest
        return
    gradients = [gradient / stage.copies for gradient in summed(stage.take_gradients(version), stage)]
    oldest = min(stage.in_use(), default=stage.newest + 1)
    stage.update(gradients, keep_from=min(oldest, version) if semantics == "vertical_sync" else oldest)


def summed(gradients, stage):
    """Over the ranks that hold the same part; each has those of its own micro-batches."""
    if stage.group is not None:
        import torch.distributed as dist
        for gradient in gradients:
            dist.all_reduce(gradient, group=stage.group)
    return gradients


class Log:
    """Losses, and a line about them for each tenth of the run, from the rank that computes them."""

    def __init__(self, settings, rank, stages):
        self.settings, self.rank, self.stages = settings, rank, stages
        self.begun = time.perf_counter()
        self.total = settings["steps"] * settings["micro_batches"]

    def loss(self, losses, k, loss):
        losses[k] = loss
        done, every = len(losses), max(1, self.total // 10)
        if done % every == 0:
            tokens = done * self.settings["micro_batch"] * self.settings["seq"] / (time.perf_counter() - self.begun)
            recent = sum(sorted(losses.items())[-every:][n][1] for n in range(every)) / every
            print(f"micro-batch {done}/{self.total}  loss {recent:.4f}  {tokens:,.0f} tokens/s  versions held by rank {self.rank.rank}: "
                  f"{max(len(stage.versions) for stage in self.stages)}", file=sys.stderr, flush=True)


def train(run):
    """One rank."""
    pipeline(run, run.join(run.settings["timeout_seconds"], deepspeed=False))


def pipeline(run, rank):
    """Train on the ranks of a process group that is there -> {losses, weights, ...} as one_process.finish gives it, on rank 0."""
    import torch
    import torch.distributed as dist

    from pipedream import one_process
    from pipedream.messages import Messages, communicators, owners
    from pipedream.stages import Part, Stage
    from yardstick import data
    from yardstick.model import layers

    settings = run.settings
    corpus, count = data.load(), settings["micro_batches"]
    schedule = schedule_of(settings, run.world)
    semantics = settings["mode"] if settings["mode"] in ASYNCHRONOUS else "flush"
    model = cut(layers(shape_of(settings, corpus.vocab), getattr(torch, settings["dtype"]), settings["seed"]), schedule.model_parts)
    holders = {part: sorted({owner for (each, _), owner in owners(schedule).items() if each == part})
               for part in range(schedule.model_parts)}
    groups = communicators(schedule)                        # every rank makes every group, in one order
    together = {part: dist.new_group(who) if len(who) > 1 else None for part, who in holders.items()}
    stages = [Stage(Part(model[part], part, part == schedule.model_parts - 1).to(rank.device), settings["learning_rate"],
                    semantics == "naive", together[part], len(holders[part])) for part in schedule.stage_of[rank.rank]]
    batches = data.Batches(corpus.train, settings["seq"], count * settings["micro_batch"], settings["seed"])

    def tokens_of(step):                                    # [micro-batch, B, T]
        return torch.from_numpy(batches.step(step, accumulation=count)).to(rank.device)
    shape = settings["micro_batch"], settings["seq"], settings["hidden"]
    events, losses = [], {}
    log = Log(settings, rank, stages)
    steps = range(settings["steps"])
    for first in steps if semantics == "flush" else steps[:1]:
        tokens = tokens_of(first) if semantics == "flush" else torch.cat([tokens_of(step) for step in steps])
        messages = Messages(schedule, rank, shape, getattr(torch, settings["dtype"]), groups)
        interpret(schedule, rank, stages, messages, tokens, semantics, settings, events,
                  lambda k, loss: log.loss(losses, first * count + k, loss))
        if semantics == "flush":
            for stage in sorted(stages, key=lambda stage: stage.part.place):     # a part on two ranks: all-reduced in one order
                stage.update(summed(stage.take_gradients(stage.newest), stage), keep_from=stage.newest + 1)
    return one_process.finish(run, rank, schedule, stages, model, losses, events, semantics, [tokens_of(step) for step in steps])


if __name__ == "__main__":
    program.main(__file__, CONFIG, train, check)
