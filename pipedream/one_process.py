"""The same training in one process: what a pipeline must come to, in its order of updates and with its delays.

An asynchronous pipeline computes w_s(t+1) = w_s(t) - rate * gradient_s, where the forward and the backward of micro-batch k take, on
every stage s, the versions that pipedream.simulator.versions says. `delayed` does that for one micro-batch after the other; with
equal sums in equal order its weights are the pipeline's in every bit. `together` is a step of plain SGD on the whole model.
"""

import copy
import math
import time

import torch

from pipedream.simulator import held_versions, versions
from pipedream.stages import Part, Stage


def taken(schedule, semantics):
    """{(part, micro-batch, "F" or "B"): version of the weights} of a schedule with one part on a rank."""
    found = {}
    for rank, used in enumerate(versions(schedule, semantics)):
        for op, version in zip(schedule[rank], used):
            found[schedule.stage_of[rank][0], op.micro_batch, op.kind] = version
    return found


def delayed(model, schedule, semantics, tokens, rate, count):
    """Train asynchronously in one process -> (losses, [weights of each part]). count: micro-batches of a step, which 2BW averages."""
    version_of, last = taken(schedule, semantics), len(model) - 1
    stages = [Stage(Part(layers, place, place == last), rate) for place, layers in enumerate(model)]
    sums, losses = [[] for _ in stages], []
    for k, rows in enumerate(tokens):
        x, inputs = rows, []
        for place, stage in enumerate(stages):
            x = stage.forward(k, x, version_of[place, k, "F"], rows if place == last else None)
            inputs.append(x)
        losses.append(x.item())
        gradient = None
        for place, stage in reversed(list(enumerate(stages))):
            forward, backward = version_of[place, k, "F"], version_of[place, k, "B"]
            kept = [leaf.detach().clone() for leaf in stage.versions[forward]] if forward != backward else None
            if kept:                                        # naive: the backward meets newer weights than its forward
                _overwrite(stage.versions[forward], stage.versions[backward])
            gradient = stage.backward(k, gradient, scale=1 / count if semantics == "2bw" else 1.0)
            if kept:
                _overwrite(stage.versions[forward], kept)
            each = count if semantics == "2bw" else schedule.replicas[place]
            sums[place] = _plus(sums[place], stage.take_gradients(forward))
            if (k + 1) % each == 0:
                stage.update(sums[place] if semantics == "2bw" else [total / each for total in sums[place]], keep_from=-1)
                sums[place] = []
    return losses, [stage.versions[stage.newest] for stage in stages]


def together(model, tokens, rate, count):
    """Plain SGD in one process on steps of `count` micro-batches -> (losses of the micro-batches, [weights of each part])."""
    whole = Part([layer for layers in model for layer in layers], 0, True)
    losses = []
    for first in range(0, len(tokens), count):
        whole.zero_grad()
        for rows in tokens[first:first + count]:
            whole.later = []
            loss = whole(rows, rows)
            losses.append(loss.item())
            (loss / count).backward()
            with torch.no_grad():
                for gradient in whole.later:
                    gradient()
        with torch.no_grad():
            for weight in whole.parameters():
                weight -= rate * weight.grad
    return losses, [[weight for layer in layers for weight in layer.parameters()] for layers in model]


def _overwrite(leaves, values):
    for leaf, value in zip(leaves, values):
        leaf.data.copy_(value.detach())


def _plus(sums, gradients):
    return [a + b for a, b in zip(sums, gradients)] if sums else gradients


def finish(run, rank, schedule, stages, model, losses, events, semantics, tokens):
    """Gather what the ranks have, compare with one process, print and record it -> {"measured", "losses", "events"} on rank 0.

    events: per rank [kind, micro-batch, chunk, start, end, version], in seconds from the first start of any rank.
    """
    settings, dist = run.settings, torch.distributed
    mine = {"losses": losses, "events": events, "weights": {stage.part.place: [weight.detach().cpu() for weight in stage.weights_of(stage.newest)]
                                                            for stage in stages}}
    everyone = [None] * run.world
    dist.all_gather_object(everyone, mine)
    if rank.rank:
        return None
    losses = dict(pair for each in everyone for pair in each["losses"].items())
    weights = {part: values for each in everyone for part, values in each["weights"].items()}
    measured = {"loss_nats_first": _mean(losses, range(settings["micro_batches"])),
                "loss_nats_last": _mean(losses, range(len(losses) - settings["micro_batches"], len(losses))),
                "versions_count": max(held_versions(schedule, semantics)), "micro_batches_count": len(losses)}
    if settings["check"]:
        begun = time.perf_counter()
        rows = torch.cat(tokens).cpu()
        alone = [[copy.deepcopy(layer).cpu() for layer in layers] for layers in model]
        if semantics == "flush":
            found = together(alone, rows, settings["learning_rate"], settings["micro_batches"])
        else:
            found = delayed(alone, schedule, semantics, rows, settings["learning_rate"], settings["micro_batches"])
        pairs = [(mine, its.detach()) for part, values in sorted(weights.items()) for mine, its in zip(values, found[1][part])]
        measured["weights_apart_ratio_max"] = max(float((a - b).abs().max()) for a, b in pairs)
        measured["losses_apart_nats_max"] = max(abs(losses[k] - loss) for k, loss in enumerate(found[0]))
        same = all(torch.equal(a, b) for a, b in pairs)
        print(f"against one process with the same updates: weights differ by {measured['weights_apart_ratio_max']:.1e}"
              + (", equal in every bit" if same else "") + f", losses by {measured['losses_apart_nats_max']:.1e} ({time.perf_counter() - begun:.1f} s)")
    curve = [losses[k] for k in sorted(losses)]
    begun = min(event[3] for each in everyone for event in each["events"])
    events = [[[*event[:3], event[3] - begun, event[4] - begun, event[5]] for event in each["events"]] for each in everyone]
    finite = {key: value for key, value in measured.items() if math.isfinite(value)}          # JSON has no other numbers
    run.record(rank, finite, outcome="ok" if finite == measured else "diverged", details={
        "loss": [loss if math.isfinite(loss) else None for loss in curve], "schedule": schedule.name, "semantics": semantics, "events": events})
    return {"measured": measured, "losses": curve, "events": events}


def _mean(losses, which):
    return sum(losses[k] for k in which) / len(which)
