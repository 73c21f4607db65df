"""Splits a profiled model over machines: which layers make a stage, and how many machines replicate it.

    python pipedream/partitioner.py profile=pipedream/profiles/gpt.txt machines=4 bandwidths=1e9
    python pipedream/partitioner.py profile=vgg16.graph.txt machines=4,4 bandwidths=12e9,1.25e9 model=corrected memory=16e9

The dynamic programme of PipeDream (SOSP'19, section 3.1): over the cuts of the model's graph and the machines used, level by level of
the network, it minimises the time of the slowest stage, which is the time of one minibatch once the pipeline is full. Three models of
what a stage costs:

released    as the authors' code computes (github.com/msr-fiddle/pipedream, optimizer_graph_hierarchical.py): (compute + 4 (m-1)/m |w| /
            B) / m on m machines, nothing overlapped; a transfer between stages only with an activation_compression_ratio; memory for the
            versions of the weights beyond the live one.
paper       the paper's text: max(compute, 2 (m-1) |w| / B) / m; each cut costs 2 a / B.
corrected   a ring all-reduce of a replicated stage's gradients, once for m minibatches and overlapped; each stage's transfers over the
            links of its own replicas, in and out, overlapped; memory with the live version.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipedream.graph import cuts, read_graph, write_graph
from yardstick.settings import Choice, Either, SettingsError, override, usage

CONFIG = {
    "profile": "pipedream/profiles/gpt.txt",   # a graph in PipeDream's text format
    "machines": "4",                      # per level of the network, innermost first, joined by commas
    "bandwidths": "1e9",                  # bytes per second of a link of each level
    "memory": Either(float),              # bytes of one machine; None: no limit
    "straight": False,                    # no stage is replicated
    "fewer_machines": False,              # machines may stay unused
    "activation_compression_ratio": Either(float),   # released: transfers cost 1 / this of their bytes; None: nothing
    "model": Choice("released", "paper", "corrected"),
    "write": Either(str),                 # file for the profile with a stage_id on each node
}


@dataclass
class Plan:
    """stages: [(first, after last)] of the states of Cuts; replicas: machines of each, all levels together; time: seconds of a minibatch
    (profile's milliseconds / 1000), data_parallel_time: those of one stage on all machines; levels: per level, outermost first, its
    own [(first, after last, replicas)]; nodes: {name: stage}."""

    stages: list
    replicas: list
    time: float
    data_parallel_time: float
    levels: list = field(repr=False, default_factory=list)
    nodes: dict = field(repr=False, default_factory=dict)


def partition(graph, machines=[4], bandwidths=[1e9], memory=None, straight=False, fewer_machines=False,
              activation_compression_ratio=None, model="released"):
    """The Plan with the least time under `model`. machines and bandwidths: per level, innermost first; bytes and bytes per second.

    Of equal plans it takes the one with the fewest stages, then with the earliest last cut, then with the fewest machines behind it.
    Raises ValueError for arguments that make no sense and where no plan fits the memory, with the least memory that does.
    """
    _check(machines, bandwidths, memory, activation_compression_ratio, model)
    where = cuts(graph) if not hasattr(graph, "ancestors") else graph
    n, tables, inner = len(where.whole), [], 1
    whole = np.array(where.whole) / [1000.0, 1, 1]
    ranges = whole[None, :, :] - np.concatenate([np.zeros((1, 3)), whole[:-1]])[:, None, :]       # [i, j]: states i to j
    compute = np.where(np.arange(n)[:, None] <= np.arange(n), ranges[:, :, 0], np.inf)
    single = compute[0, -1]
    parallel = single
    for level, (count, bandwidth) in enumerate(zip(machines, bandwidths)):
        costs = _Costs(model, ranges, np.array(where.output), count, bandwidth, inner, memory, activation_compression_ratio)
        tables.append(_solve(compute, costs, where.ancestors, count, straight, fewer_machines, last=level == len(machines) - 1))
        compute = tables[-1][0][:, :, -1]
        parallel = _data_parallel(model, parallel, whole[-1, 2], count, bandwidth, inner)
        inner = count
    time = tables[-1][0][0, n - 1, -1]
    if not math.isfinite(time):
        raise ValueError(f"no plan of {machines} machines fits memory={memory:g} bytes" + (" with one machine per stage" if straight else "")
                         + f"; the whole model has {whole[-1, 2]:,.0f} bytes of weights and {whole[-1, 1]:,.0f} of activations.")
    levels, spans = [], [(0, n, 1)]
    for table, count in zip(reversed(tables), reversed(list(machines))):
        spans = [(first, last, outer * replicas) for start, end, outer in spans
                 for first, last, replicas in _stages(table, start, end, count)]
        levels.append(spans)
    stage_of = {}
    for stage, (_, last, _) in enumerate(spans):
        for name in where.nodes[last - 1]:
            stage_of.setdefault(name, stage)
    return Plan([(first, last) for first, last, _ in spans], [replicas for *_, replicas in spans], float(time), float(parallel),
                levels, stage_of)


class _Costs:
    """What one stage of states i to j costs on m machines of a level, by model; matrices over i and j."""

    def __init__(self, model, ranges, output, count, bandwidth, inner, memory, compression):
        self.model, self.count, self.bandwidth, self.inner = model, count, bandwidth, inner
        self.ranges, self.output, self.memory, self.compression = ranges, output, memory, compression
        self.last = np.arange(len(output)) == len(output) - 1

    def stage(self, compute, m, first):
        """Seconds of a minibatch in a stage; first: it is the level's only one or its first, where the released code divides the
        gradients' traffic by the machines of the level below."""
        weights = self.ranges[:, :, 2]
        if self.model == "paper":
            return np.maximum(compute, 2 * (m - 1) * weights / self.bandwidth) / m
        if self.model == "corrected":                                    # a ring sends 2 (m-1)/m |w| for m minibatches
            return np.maximum(compute / m, 2 * (m - 1) / m * weights / self.bandwidth / m)
        return (compute + 4 * (m - 1) * weights / (self.bandwidth * m) / (self.inner if first else 1)) / m

    def transfers(self, m):
        """(seconds [k] of the cut before a stage of m machines whose input is state k's output, seconds [j] of the cut behind it)"""
        if self.model == "released" and self.compression is None:
            return 0 * self.output, 0 * self.output
        once = 2 * self.output / self.bandwidth / (self.compression or 1)
        if self.model == "paper":
            return once, 0 * once
        return once / m, np.where(self.last, 0.0, once / m)

    def fits(self, m, behind):
        """[i, j]: a stage on m machines with `behind` machines in later stages can hold its activations and weights."""
        if self.memory is None:
            return True
        versions = math.ceil(behind / m) + (0 if self.model == "released" else 1)
        return versions * (self.ranges[:, :, 1] + self.ranges[:, :, 2]) <= self.memory


def _solve(compute, costs, ancestors, count, straight, fewer, last):
    """(A[i, j, m-1]: least seconds of states i to j on m machines, cut[i, j, m-1]: the last cut k or -1, used: machines of the last
    stage). The outermost level needs i = 0 only."""
    n = len(compute)
    rows = 1 if last else n
    best = np.full((n, n, count), np.inf)
    cut, used = np.full((n, n, count), -1, np.int32), np.tile(np.arange(1, count + 1, dtype=np.int32), (n, n, 1))
    outward = np.zeros(n)
    for m in range(1, 2 if straight else count + 1):
        time = costs.stage(compute, m, True)
        if costs.model == "corrected":
            outward = costs.transfers(m)[1]
            time = np.maximum(time, outward[None, :])
        best[:, :, m - 1] = np.where(costs.fits(m, count - m), time, np.inf)
    allowed = np.zeros((n, n), bool)                                      # [k, j]: a cut behind k, before j
    for j, before in enumerate(ancestors):
        allowed[sorted(before), j] = True
    shifted = [np.concatenate([matrix[1:], np.full((1, n), np.inf)]) for matrix in (
        costs.stage(compute, m, False) for m in range(1, 2 if straight else count))]      # [k, j]: the stage of k+1 to j
    for m in range(2, count + 1):
        tops, cuts_, uses = best[:rows, :, m - 1].copy(), cut[:rows, :, m - 1], used[:rows, :, m - 1]
        if fewer:
            less = best[:rows, :, m - 2] < tops
            tops = np.where(less, best[:rows, :, m - 2], tops)
            cuts_, uses = np.where(less, cut[:rows, :, m - 2], cuts_), np.where(less, used[:rows, :, m - 2], uses)
        for mine in range(1, 2 if straight else m):
            inward, outward = costs.transfers(mine)
            fits = costs.fits(mine, count - m)
            stage = np.maximum(np.maximum(shifted[mine - 1], inward[:, None]), outward[None, :])
            if fits is not True:
                stage = np.where(np.concatenate([fits[1:], np.zeros((1, n), bool)]), stage, np.inf)
            stage = np.where(allowed, stage, np.inf)
            for i in range(rows):
                first = best[i, :, m - mine - 1]
                options = np.maximum(first[:, None], stage)              # [k, j]
                if i:
                    options[sorted(ancestors[i - 1])] = np.inf
                k = options.argmin(axis=0)
                value = options[k, np.arange(n)]
                better = (value < tops[i]) & (np.arange(n) > i)
                tops[i], cuts_[i], uses[i] = (np.where(better, new, old) for new, old in ((value, tops[i]), (k, cuts_[i]), (mine, uses[i])))
        best[:rows, :, m - 1], cut[:rows, :, m - 1], used[:rows, :, m - 1] = tops, cuts_, uses
    return best, cut, used, fewer


def _stages(table, start, end, count):
    """[(first state, after last, machines)] of the best plan of states start to end - 1 on all machines of a level."""
    best, cut, used, fewer = table
    found, m, last = [], count, end
    while True:
        if fewer:
            while m > 1 and best[start, last - 1, m - 2] == best[start, last - 1, m - 1]:
                m -= 1
        k, mine = int(cut[start, last - 1, m - 1]), int(used[start, last - 1, m - 1])
        if k < 0:
            return [(start, last, mine), *reversed(found)]
        found.append((k + 1, last, mine))
        last, m = k + 1, m - mine


def _data_parallel(model, inside, weights, count, bandwidth, inner):
    """Seconds of a minibatch with the whole model on every machine of a level, `inside` being that of the level below."""
    if model == "paper":
        return max(inside, 2 * (count - 1) * weights / bandwidth) / count
    if model == "corrected":
        return max(inside / count, 2 * (count - 1) / count * weights / bandwidth / count)
    return (inside + 4 * (count - 1) * weights / (bandwidth * count) / inner) / count


def _check(machines, bandwidths, memory, compression, model):
    if len(machines) != len(bandwidths) or not machines:
        raise ValueError(f"machines={machines} and bandwidths={bandwidths} must be as long as each other: one entry per level.")
    if any(not isinstance(m, (int, np.integer)) or m < 1 for m in machines):
        raise ValueError(f"machines={machines} must be whole numbers from 1.")
    for word, values in (("bandwidths", bandwidths), ("memory", [memory]), ("activation_compression_ratio", [compression])):
        if any(value is not None and not value > 0 for value in values):
            raise ValueError(f"{word}={values} must be above zero.")
    if model not in ("released", "paper", "corrected"):
        raise ValueError(f"model={model!r} is none of released, paper, corrected.")


def describe(plan, graph, where):
    """Lines of text: the stages of a plan, what each costs and holds."""
    lines = [f"{len(plan.stages)} stages on {sum(plan.replicas)} machines, {'-'.join(map(str, plan.replicas))}: {plan.time * 1e3:.3f} ms a minibatch; data "
             f"parallel {plan.data_parallel_time * 1e3:.3f} ms, {plan.data_parallel_time / plan.time:.2f} times as long",
             f"{'stage':>5}{'machines':>10}{'states':>12}{'compute, ms':>13}{'weights, MB':>13}{'sent on, MB':>13}  last layer"]
    for stage, ((first, last), replicas) in enumerate(zip(plan.stages, plan.replicas)):
        before = where.whole[first - 1] if first else (0, 0, 0)
        time, _, weights = (a - b for a, b in zip(where.whole[last - 1], before))
        layer = graph.nodes[next(name for name in reversed(graph.order()) if plan.nodes.get(name) == stage)].description
        sent = where.output[last - 1] / 1e6 if last < len(where.whole) else 0.0
        lines.append(f"{stage:>5}{replicas:>10}{f'{first}..{last - 1}':>12}{time / replicas:>13.3f}{weights / 1e6:>13.2f}{sent:>13.2f}  {layer[:40]}")
    return "\n".join(lines)


def main():
    if text := usage(sys.argv[1:], __file__):
        print(text)
        return
    settings = override(CONFIG, sys.argv[1:], "pipedream/partitioner.py")
    numbers = []
    for key, kind in (("machines", int), ("bandwidths", float)):
        try:
            numbers.append([kind(part) for part in settings[key].split(",")])
        except ValueError:
            raise SettingsError(f"{key}={settings[key]} must be numbers joined by commas, one per level: {CONFIG[key]}.") from None
    path = Path(settings["profile"])
    graph = read_graph(path if path.exists() else Path(__file__).resolve().parent.parent / path)
    plan = partition(graph, *numbers, **{key: settings[key] for key in ("memory", "straight", "fewer_machines",
                                                                        "activation_compression_ratio", "model")})
    print(describe(plan, graph, cuts(graph)))
    if settings["write"]:
        for name, node in graph.nodes.items():
            node.stage = plan.nodes.get(name, 0 if not graph.before[name] else None)
        write_graph(graph, settings["write"])
        print(f"written: {settings['write']}")


if __name__ == "__main__":
    try:
        main()
    except (SettingsError, ValueError, OSError) as error:
        sys.exit(f"pipedream/partitioner.py: {error}")
