"""Tables of COMPARISON.md: schedules among each other, pipelines beside other strategies, and what planners choose.

    python pipedream/tables.py table=schedules stages=8 micro_batches=32
    python pipedream/tables.py table=strategies model=gpt2-xl devices=16
    python pipedream/tables.py table=planners profile=pipedream/profiles/vgg16.txt

Nothing here is measured but the profiles: rows come from the simulator, the planner and yardstick/formulas.py.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipedream.graph import cuts, read_graph
from pipedream.partitioner import partition
from pipedream.simulator import compare
from yardstick import formulas, schedules
from yardstick.settings import Choice, SettingsError, override, usage
from yardstick.shapes import MODELS, PAPER, Layout

CONFIG = {
    "table": Choice("schedules", "strategies", "planners", "alpa"),
    "stages": 4,                          # schedules: ranks
    "micro_batches": 8,                   # schedules, strategies, alpa: of a step
    "model": "gpt2-xl",                   # strategies: of yardstick/shapes.py
    "devices": 16,                        # strategies: all of them
    "profile": "pipedream/profiles/vgg16.txt",        # planners, alpa
    "machines": 4,                        # planners, alpa: one level of network
    "bandwidth": 50e6,                    # alpa: bytes per second of a machine's link
}
ROOT = Path(__file__).resolve().parent.parent
GB = 10**9


def table(head, rows, right=1):
    """Markdown; columns from `right` on are numbers and stand right."""
    lines = [head, ["---" if n < right else "---:" for n in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines)


def of_schedules(settings):
    """Every schedule for one size: time, three bubbles, memory, versions, bytes."""
    p, m = settings["stages"], settings["micro_batches"]
    rows, without = [], []
    for name, timeline in compare(schedules.NAMES, p, m, forward=1.0, input_grad=1.0, weight_grad=1.0, send=0.0).items():
        if isinstance(timeline, str):
            without.append(timeline)
            continue
        schedule = timeline.schedule
        share = p / schedule.model_parts                             # of a rank's usual part of the model, in one chunk
        sent = formulas.pipeline_bytes(name, p, m, message=1.0, chunks=schedule.chunks) / m
        held, versions = [peak * share for peak in timeline.peak_in_flight], timeline.weight_versions
        rows.append([name, schedule.chunks, f"{timeline.makespan:g}", f"{timeline.bubble_of_makespan:.1%}", f"{timeline.bubble_of_span:.1%}",
                     f"{timeline.bubble_of_ideal:.1%}", f"{max(held):g}", f"{min(held):g}", f"{max(versions) * schedule.chunks * share:g}",
                     max(versions), f"{sent:g}"])
    text = table(["schedule", "parts of a rank", "makespan", "idle of makespan", "of span", "over ideal", "activations, most", "least",
                  "copies of weights", "versions", "sent"], rows)
    return "\n\n".join([f"{p} ranks, {m} micro-batches, F = I = W = 1 for a rank's whole part of the model:", text, *without])


def of_strategies(settings):
    """Bytes that a device holds and sends in a step, for one model and batch, by the papers' formulas."""
    if settings["model"] not in MODELS:
        raise SettingsError(f"model={settings['model']} is none of {', '.join(MODELS)}.")
    shape, n, m = MODELS[settings["model"]], settings["devices"], settings["micro_batches"]
    P, batch = formulas.param_count(shape), n * m                    # one sequence is a micro-batch of data parallelism
    weights, one = 2.0 * P, formulas.activation_bytes(shape)         # of the whole model, 16 bits; of one sequence through it
    edge = 2.0 * shape.seq * shape.hidden                            # bytes of a sequence at a boundary between layers
    rows = []
    for stage in range(4):
        reduces, gathers = {0: (1, 1), 1: (1, 1), 2: (m, 1), 3: (m, 2 * m)}[stage]      # arXiv 1910.02054, section 7; 2 and 3 at every micro-batch
        sent = reduces * formulas.ring_bytes("reduce_scatter", weights, n) + gathers * formulas.ring_bytes("all_gather", weights, n)
        rows.append(["data parallel" if not stage else f"ZeRO-{stage}", formulas.zero_state_bytes(params=P, ranks=n, stage=stage), one, sent, 0.0, 0])
    t = 4
    tensor = formulas.activation_bytes(shape, Layout(tp=t))
    layer = formulas.ring_bytes("all_reduce", edge, t)               # arXiv 1909.08053, section 3: four a layer, two each way
    rows.append([f"Megatron: tensor parallel {t}, data parallel {n // t}", PAPER.total * P / t, tensor, 4 * shape.layers * layer * batch / (n // t)
                 + formulas.ring_bytes("all_reduce", weights / t, n // t), 0.0, 0])
    for name, words, copies in (("gpipe", "GPipe", 1), ("1f1b", "1F1B", 1), ("zb_h1", "ZB-H1", 1), ("zb_h2", "ZB-H2", 1),
                                ("pipedream_2bw", "PipeDream-2BW", 2), ("pipedream", "PipeDream, weight stashing", n)):
        held = formulas.activations_in_flight(name, n, batch, 0) * one / n
        state = (PAPER.total + PAPER.parameter * (copies - 1)) * P / n
        asynchronous = name.startswith("pipedream")
        rows.append([f"{words}, {n} stages", state, held, 2 * batch * edge, 0.0 if asynchronous else formulas.bubble_fraction(name, n, batch),
                     formulas.staleness({"pipedream": "stash", "pipedream_2bw": "2bw"}.get(name, "flush"), n, 0)])
    text = table(["strategy", "weights, gradients, Adam: GB", "activations, GB", "all, GB", "sent, GB", "idle of step", "staleness, updates"], [
        [name, f"{state / GB:.2f}", f"{held / GB:.2f}", f"{(state + held) / GB:.2f}", f"{sent / GB:.2f}", f"{idle:.1%}", late]
        for name, state, held, sent, idle, late in rows])
    return (f"{settings['model']} ({P:,} parameters), {n} devices, {batch} sequences of {shape.seq} tokens a step, micro-batches of one; "
            f"16-bit weights and gradients, Adam in fp32, no recomputation:\n\n{text}")


def stage_seconds(where, first, last, m, bandwidth):
    """(work, sums) of states first to last - 1 on m machines: seconds of a minibatch for computing or sending on, whichever is longer, and
    of one ring all-reduce of their gradients. The planner's model "corrected" takes the longer of work and sums / m."""
    time, _, weights = (a - b for a, b in zip(where.whole[last - 1], where.whole[first - 1] if first else (0, 0, 0)))
    edges = [where.output[cut - 1] for cut in (first, last) if 0 < cut < len(where.whole)]
    return max([time / 1000 / m, *(2 * edge / bandwidth / m for edge in edges)]), 2 * (m - 1) / m * weights / bandwidth


def seconds(where, plan, bandwidth):
    """Seconds of a minibatch of a plan under the model "corrected", for one level of network."""
    times = [(*stage_seconds(where, first, last, m, bandwidth), m) for (first, last), m in zip(plan.stages, plan.replicas)]
    return max(max(work, sums / m) for work, sums, m in times)


def graph_of(settings):
    path = Path(settings["profile"])
    return read_graph(path if path.exists() else ROOT / path)


def of_planners(settings):
    """What the models of the planner choose for one profile, and what each choice would take under "corrected"."""
    where, m, rows = cuts(graph_of(settings)), settings["machines"], []
    for bandwidth in (10e6, 125e6, 1.25e9, 12e9):
        chosen = [partition(where, [m], [bandwidth], activation_compression_ratio=ratio, model=model)
                  for model, ratio in (("released", None), ("released", 1.0), ("paper", None), ("corrected", None))]
        best = seconds(where, chosen[-1], bandwidth)
        rows.append([f"{bandwidth / 1e6:,.0f}", *(f"{'-'.join(map(str, plan.replicas))} ({seconds(where, plan, bandwidth) / best:.2f})"
                                                  for plan in chosen)])
    name = Path(settings["profile"]).stem
    return (f"{name}, {m} machines: how many each stage gets, and in brackets the time of that plan under \"corrected\" over the best there:\n\n"
            + table(["MB/s", "released", "released, transfers charged", "paper", "corrected"], rows))


def of_alpa(settings):
    """PipeDream's objective and Alpa's on the same profile and costs: a minibatch in steady state, or a whole step with fill and drain."""
    where, machines, bandwidth = cuts(graph_of(settings)), settings["machines"], settings["bandwidth"]
    n, plans, known = len(where.whole), [], {}
    if machines > 4 or n > 60:
        raise SettingsError(f"machines={machines} and {n} states: every plan is tried, which takes machines of at most 4 and 60 states.")
    for count in range(1, machines + 1):
        for replicas in itertools.product((1, 2, 4), repeat=count):
            if sum(replicas) == machines:
                for inside in itertools.combinations(range(1, n), count - 1):
                    stages = tuple(zip((0, *inside), (*inside, n), replicas))
                    for stage in stages:
                        if stage not in known:
                            known[stage] = stage_seconds(where, *stage, bandwidth)
                    plans.append(([known[stage] for stage in stages], replicas))

    def steady(plan):                                                # an update for each minibatch, overlapped
        return max(max(work, sums / m) for (work, sums), m in zip(*plan))

    def step(plan, m):                                               # arXiv 2201.12023, equation 2, and one sum of gradients a step
        works = [work for work, _ in plan[0]]
        return sum(works) + (m - 1) * max(works) + max(sums for _, sums in plan[0])
    mine, rows = min(plans, key=lambda plan: (steady(plan), len(plan[1]))), []
    for m in (1, 4, 16, 64, 256):
        best = min(plans, key=lambda plan: (step(plan, m), len(plan[1])))
        rows.append([m, "-".join(map(str, best[1])), f"{step(best, m):.2f}", f"{step(mine, m):.2f}", f"{step(mine, m) / step(best, m):.2f}"])
    name = Path(settings["profile"]).stem
    return (f"{name}, {machines} machines at {bandwidth / 1e6:g} MB/s. PipeDream takes the least time of the slowest stage: "
            f"{'-'.join(map(str, mine[1]))}, {steady(mine):.3f} s a minibatch.\n\n"
            + table(["micro-batches of a step", "Alpa's choice", "its step, s", "that step with PipeDream's choice, s", "ratio"], rows))


TABLES = {"schedules": of_schedules, "strategies": of_strategies, "planners": of_planners, "alpa": of_alpa}


def main():
    if text := usage(sys.argv[1:], __file__):
        print(text)
        return
    settings = override(CONFIG, sys.argv[1:], "pipedream/tables.py")
    for key in ("stages", "micro_batches", "devices", "machines"):
        if settings[key] < 1:
            raise SettingsError(f"{key}={settings[key]} must be at least 1.")
    print(TABLES[settings["table"]](settings))


if __name__ == "__main__":
    try:
        main()
    except (SettingsError, ValueError, OSError) as error:
        sys.exit(f"pipedream/tables.py: {error}")
