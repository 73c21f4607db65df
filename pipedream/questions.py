"""Recurring questions about pipelines, each answered by a small experiment or a formula in one process.

    python pipedream/questions.py question=loss            # why is my loss divided by the number of micro-batches?
    python pipedream/questions.py question=zero2           # why does ZeRO-2 not go with pipelines?
    python pipedream/questions.py question=staleness       # what does weight staleness do?
    python pipedream/questions.py question=naive           # what is wrong with gradients of naive pipelining?
    python pipedream/questions.py question=B               # which B is meant in a bubble's formula?
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yardstick import formulas, results, schedules
from yardstick.settings import Choice, Either, SettingsError, override, usage
from yardstick.shapes import ModelShape

CONFIG = {
    "question": Choice("loss", "zero2", "staleness", "naive", "B"),
    "micro_batches": 8,                   # loss, zero2: of a step
    "stages": 4,                          # naive, B: ranks of the pipeline
    "learning_rate": 0.1,                 # naive: of the updates between forward and backward
    "updates": 100,                       # staleness: of the small GPT, for each number
    "record": Either(str),                # LABEL: keep what is printed in results/LABEL/pipedream
}
SHAPE = ModelShape(layers=8, hidden=32, heads=2, vocab=4096, seq=32, tied=False)


def batches(count, rows=1):
    """[tokens [rows, T]] of the embedded text."""
    import torch

    from yardstick import data
    found = data.Batches(data.load().train, SHAPE.seq, rows, 1)
    return [torch.from_numpy(found.step(step)).reshape(rows, SHAPE.seq) for step in range(count)]


def flat(tensors):
    import torch
    return torch.cat([tensor.flatten() for tensor in tensors])


def apart(a, b):
    """|a - b| / |b|"""
    return float((a - b).norm() / b.norm())


def loss(settings):
    """The gradient of a mean is the mean of the gradients: backward adds up, so each micro-batch must be weighed by 1 / m."""
    import torch
    from torch import nn

    from yardstick.model import layers, loss_of
    m = settings["micro_batches"]
    rows = torch.cat(batches(m))

    def gradient(weight, parts):
        model = nn.Sequential(*layers(SHAPE, torch.float64, seed=1))
        for part in rows.chunk(parts):
            (weight * loss_of(model(part), part)).backward()
        return model
    whole, added, divided = gradient(1.0, 1), gradient(1.0, m), gradient(1 / m, m)
    g, s, d = (flat(w.grad for w in model.parameters()) for model in (whole, added, divided))
    yield f"{m} micro-batches, gradient against that of the whole batch at once:"
    yield f"  backward on each loss:               {float(s.norm() / g.norm()):.6f} times as long, so plain SGD steps {m} times as far"
    yield f"  backward on each loss / {m}:           distance {apart(d, g):.1e}"
    moved = []
    for model in (added, divided):
        before = flat(w.detach().clone() for w in model.parameters())
        torch.optim.Adam(model.parameters(), lr=1e-3).step()
        moved.append(flat(w.detach() for w in model.parameters()) - before)
    yield f"  Adam's first update of the two:      distance {apart(moved[0], moved[1]):.1e}"
    yield ("Adam divides by the gradient's size and so hides the mistake, until clipping by norm, weight decay in the gradient or a log of the\n"
           "norm shows it.")


def zero2(settings):
    """ZeRO-2 keeps a share of the gradients, a pipeline adds them up over a step: one of the two must give way."""
    d = 8
    yield f"One pipeline stage on {d} data-parallel ranks, P = bytes of the stage's weights in 16 bits; a step of m micro-batches."
    yield "Reduce-scattering after each backward keeps a share of the gradients; the whole gradient, once summed, is ZeRO-1.\n"
    yield f"{'m':>4}{'ZeRO-1: sent, P':>18}{'gradients held, P':>19}{'ZeRO-2: sent, P':>18}{'gradients held, P':>19}{'traffic':>10}"
    for m in sorted({1, 2, 4, 8, 16, 32, settings["micro_batches"]}):
        once = formulas.ring_bytes("reduce_scatter", 1.0, d)
        gather = formulas.ring_bytes("all_gather", 1.0, d)
        yield f"{m:>4}{once + gather:>18.3f}{1.0:>19.3f}{m * once + gather:>18.3f}{1 / d:>19.3f}{(m * once + gather) / (once + gather):>9.2f}x"
    held = formulas.activations_in_flight("1f1b", d, 32, 0)
    yield ("\nWhat it would save is small beside what the pipeline holds anyway: the gradient of a stage of 8 is an eighth of the model's, "
           f"while its\nfirst rank holds the activations of {held} micro-batches. DeepSpeed's pipeline engine refuses stages 2 and 3.")


def largest_rate(delay):
    """The largest rate * curvature, by bisection, at which w(t+1) = w(t) - rate * curvature * w(t - delay) decays: the roots of
    z^(d+1) - z^d + rate * curvature lie inside the unit circle."""
    import numpy as np
    low, high = 0.0, 2.5
    for _ in range(50):
        middle = (low + high) / 2
        inside = abs(np.roots([1.0, -1.0, *[0.0] * (delay - 1), middle] if delay else [1.0, middle - 1.0])).max() < 1
        low, high = (middle, high) if inside else (low, middle)
    return low


def staleness(settings):
    """A delay of d updates shrinks the largest stable learning rate; below it little happens."""
    import torch

    from pipedream.one_process import delayed
    from pipedream.pipedream_simple import cut
    from yardstick.model import layers
    yield "On a parabola, w(t+1) = w(t) - rate * curvature * w(t-d) is stable below 2 sin(pi / (4d + 2)) (PipeMare, arXiv 1910.05124):\n"
    yield f"{'delay d':>8}{'formula':>10}{'by roots':>10}{'of SGD':>10}"
    for delay in (0, 1, 3, 7):
        bound = 2 * math.sin(math.pi / (4 * delay + 2))
        yield f"{delay:>8}{bound:>10.4f}{largest_rate(delay):>10.4f}{bound / 2:>10.1%}"
    count = settings["updates"]
    rows, tail = batches(count), max(1, count // 10)
    yield f"\nA small GPT, {count} updates, mean loss of the last {tail}; stage s of p is p-1-s updates late (stashing) or p-1 (vertical sync):\n"
    rates = (0.05, 0.2, 0.8)
    yield f"{'stages':>8}  {'semantics':<14}" + "".join(f"{f'rate {rate:g}':>12}" for rate in rates)
    for p, semantics in ((1, "stash"), (2, "stash"), (4, "stash"), (8, "stash"), (2, "vertical_sync"), (4, "vertical_sync"), (8, "vertical_sync")):
        found = []
        for rate in rates:
            model = cut(layers(SHAPE, torch.float32, seed=1), p)
            losses, _ = delayed(model, schedules.build("pipedream", p, count), semantics, rows, rate, 1)
            mean = sum(losses[-tail:]) / tail
            found.append(f"{mean:>12.4f}" if math.isfinite(mean) else f"{'diverges':>12}")
        yield f"{p:>8}  {'plain SGD' if p == 1 else semantics:<14}" + "".join(found)


def naive(settings):
    """The backward of a forward whose weights have changed is the gradient of neither: its two factors belong to two functions."""
    import torch

    from pipedream.stages import Part, Stage
    from yardstick.model import layers
    late, rate = settings["stages"] - 1, settings["learning_rate"]
    rows = batches(late + 1, rows=2)

    def stage(naive):
        return Stage(Part(layers(SHAPE, torch.float64, seed=1), 0, True), rate, naive)

    def gradient(one, tokens, version=0):
        one.forward(0, tokens, version, tokens)
        one.backward(0)
        return flat(one.take_gradients(version))

    def late_backward(one):
        """Forward of one micro-batch, then the updates of those before it, then its backward."""
        one.forward(9, rows[-1], 0, rows[-1])
        for k in range(late):
            one.forward(k, rows[k], one.newest, rows[k])
            one.backward(k)
            one.update(one.take_gradients(one.newest), keep_from=0)
        one.backward(9)
        return flat(one.take_gradients(0))
    mixed, kept = late_backward(stage(True)), late_backward(stage(False))
    old = gradient(stage(False), rows[-1])
    newer = stage(False)
    for k in range(late):
        newer.forward(k, rows[k], newer.newest, rows[k])
        newer.backward(k)
        newer.update(newer.take_gradients(newer.newest), keep_from=0)
    new = gradient(newer, rows[-1], newer.newest)
    yield f"First stage of {settings['stages']}: {late} updates between a micro-batch's forward and its backward, learning rate {rate:g}, float64."
    yield "Distance |g - g'| / |g'| of the gradient g that comes out from the true gradient g' of the same loss\n"
    yield f"{'':<42}{'at the forward weights':>24}{'at the newest weights':>24}"
    yield f"{'stashing: backward with the old weights':<42}{apart(kept, old):>24.1e}{apart(kept, new):>24.4f}"
    yield f"{'naive: backward with the newest weights':<42}{apart(mixed, old):>24.4f}{apart(mixed, new):>24.4f}"
    yield f"\nThe two true gradients are {apart(old, new):.4f} apart. Stashing gives a true one, of {late} updates ago; naive gives neither."


def B(settings):  # noqa: N802  the letter is the question
    """Three letters for a backward: whole (DeepSeek), its input part (zero bubble), and so two formulas for one bubble."""
    from pipedream.simulator import simulate
    p = settings["stages"]
    F, I, W = 1.0, 1.2, 0.7
    found = simulate(schedules.build("zb_h1", p, 4 * p), F, I, W)
    idle = found.makespan - max(found.busy)
    yield f"ZB-H1 on {p} ranks, forward {F}, gradient of the input {I}, gradient of the weights {W}; simulated idle time {idle:.4f}\n"
    whole = I + W
    for words, text, value in (("zero-bubble paper, B = input part", "(p-1) (F + B - W)", (p - 1) * (F + I - W)),
                               ("DeepSeek, B = whole backward", "(p-1) (F + B - 2W)", (p - 1) * (F + whole - 2 * W)),
                               ("mixed up: the paper's with a whole B", "(p-1) (F + B - W)", (p - 1) * (F + whole - W))):
        yield f"  {words:<40}{text:<22}{value:.4f}{'' if abs(value - idle) < 1e-9 else '   wrong by (p-1) W'}"
    yield "\nHere, in code and tables: F, I (input part), W, and B = I + W, the whole."


ANSWERS = {"loss": loss, "zero2": zero2, "staleness": staleness, "naive": naive, "B": B}


def main():
    if text := usage(sys.argv[1:], __file__):
        print(text)
        return
    settings = override(CONFIG, sys.argv[1:], "pipedream/questions.py")
    for key, least in (("micro_batches", 1), ("stages", 2), ("updates", 10)):
        if settings[key] < least:
            raise SettingsError(f"{key}={settings[key]} must be at least {least}.")
    results.check_label(settings["record"])
    if settings["question"] in ("loss", "staleness", "naive"):
        import torch
        torch.set_num_threads(1)                  # its tensors are small: threads cost more than they give
    lines = []
    for text in ANSWERS[settings["question"]](settings):
        print(text, flush=True)
        lines += text.split("\n")
    if settings["record"]:
        results.write(f"pipedream/question_{settings['question']}", label=settings["record"], settings=settings, measured={}, predicted={},
                      machine={"accelerator": "none", "ranks": 1}, details={"lines": lines})


if __name__ == "__main__":
    try:
        main()
    except (SettingsError, ValueError, OSError) as error:
        sys.exit(f"pipedream/questions.py: {error}")
