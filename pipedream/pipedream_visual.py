"""Draws this folder's figures: schedules, phases, versions, bubbles, memory, the cut of VGG-16, measured timelines, convergence.

    python pipedream/pipedream_visual.py                                   # all, into runs/figures/pipedream
    python pipedream/pipedream_visual.py figures=schedules,bubble
    python pipedream/pipedream_visual.py commit=True                       # into pipedream/images, for commits

Schedules are drawn by the simulator from yardstick/schedules.py, measurements from the records in results/LABEL/pipedream and from
pipedream/profiles. The same input gives the same files, byte for byte.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipedream.graph import cuts, read_graph
from pipedream.partitioner import partition
from pipedream.simulator import CHUNKS, simulate
from pipedream.versions import versions
from yardstick import figures, formulas, results, schedules
from yardstick import figures_pipeline as draw
from yardstick.settings import SettingsError, override, usage

CONFIG = {
    "figures": "all",                     # names of FIGURES, joined by commas
    "label": "cpu2",                      # measurements are those of results/LABEL
    "commit": False,                      # draw into pipedream/images, which is committed
}
NAMES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved_1f1b": "interleaved 1F1B", "pipedream": "PipeDream (asynchronous)",
         "pipedream_2bw": "PipeDream-2BW", "zb_h1": "ZB-H1", "zb_h2": "ZB-H2", "interleaved_zero_bubble": "interleaved zero bubble",
         "zb_v": "ZB-V", "dualpipe": "DualPipe", "dualpipe_v": "DualPipeV", "chimera": "Chimera", "hanayo": "Hanayo"}
MODES = {"flush": "synchronous SGD (1F1B, flush)", "2bw": "2BW", "stash": "weight stashing", "naive": "naive", "vertical_sync": "vertical sync"}


def simulated(name, stages, micro_batches):
    """The Timeline of a schedule whose ranks take one unit each for F, I and W of a micro-batch."""
    schedule = schedules.build(name, stages, micro_batches, CHUNKS.get(name))
    share = schedule.model_parts / schedule.stages
    return simulate(schedule, 1 / share, 1 / share, 1 / share)


def four_schedules(label):
    """GPipe, 1F1B, interleaved 1F1B and a zero-bubble schedule on one axis of time."""
    found = {name: simulated(name, 4, 8) for name in ("gpipe", "1f1b", "interleaved_1f1b", "zb_h2")}
    figure = draw.new(14, 11)
    limit = max(timeline.makespan for timeline in found.values())
    for axes, (name, timeline) in zip(figure.subplots(len(found), sharex=True), found.items()):
        held, step, span = timeline.peak_in_flight[0] / timeline.schedule.chunks, timeline.bubble_of_makespan, timeline.bubble_of_span
        draw.timeline(axes, timeline.rows, limit, f"{NAMES[name]}: {timeline.makespan:g} units, idle {step:.1%} of the step and {span:.1%} of a "
                      f"rank's own span; rank 0 holds {held:g} micro-batches")
    axes.set_xlabel("time, in units of a rank's forward of one micro-batch (F = I = W); numbers are micro-batches")
    draw.legend(figure, [row for timeline in found.values() for row in timeline.rows])
    return figure


def phases(label):
    """Warm-up, steady state and drain of 1F1B."""
    timeline = simulated("1f1b", 4, 8)
    colours = {"warm-up": "#77AADD", "steady state": "#EEDD88", "drain": "#EE8866"}
    rows, phase = timeline.rows, {}
    for rank, row in enumerate(rows):
        warm = min(3 - rank, 8)
        for place, op in enumerate(row):
            phase[rank, tuple(op[:3])] = "warm-up" if place < warm else "drain" if place >= len(row) - warm else "steady state"
    figure = draw.new(14, 4.6)
    axes = figure.subplots()
    ranks = {id(op): rank for rank, row in enumerate(rows) for op in row}
    draw.timeline(axes, rows, title="1F1B: rank r of p begins with p-1-r forwards, then runs one forward and one backward in turn",
                  colour=lambda op: colours[phase[ranks[id(op)], tuple(op[:3])]], label=lambda op: f"{op[0]}{op[1]}")
    axes.set_xlabel("time, in units of a forward; a backward takes two")
    draw.below(figure, {**colours, "idle": draw.IDLE})
    return figure


def weight_versions(label):
    """Which version of the weights each forward and backward uses, under four semantics."""
    figure = draw.new(15, 13)
    panels = [("naive", "pipedream", "naive: each takes the newest; the backward of a micro-batch meets other weights than its forward did"),
              ("stash", "pipedream", "weight stashing: the backward takes what the forward took; stages differ"),
              ("vertical_sync", "pipedream", "vertical sync: every stage takes what the first one took"),
              ("2bw", "pipedream_2bw", "2BW: an update for every 4 micro-batches; each takes the last version but one")]
    for axes, (semantics, name, title) in zip(figure.subplots(len(panels), sharex=True), panels):
        timeline = simulated(name, 4, 12)
        rows = [[[*row[:5], version] for row, version in zip(rank, used)]
                for rank, used in zip(timeline.rows, versions(timeline.schedule, semantics))]
        draw.timeline(axes, rows, timeline.makespan, title, colour=lambda row: draw.LIGHT[row[5] % len(draw.LIGHT)],
                      label=lambda row: f"{row[0]}{row[1]}\nv{row[5]}")
    axes.set_xlabel("time, in units of a forward; F5 forward, B5 backward of micro-batch 5; v3: weights after three updates of that stage")
    return figure


def bubble(label, stages=8, counts=(8, 16, 24, 32, 48, 64, 96, 128)):
    """Idle share against micro-batches: simulated points on the lines of the formulas."""
    kinds = {"makespan": formulas.bubble_fraction, "span": formulas.bubble_fraction_of_span}
    points, curves = ({kind: {name: [] for name in schedules.NAMES} for kind in kinds} for _ in range(2))
    for name in schedules.NAMES:
        for m in counts:
            try:
                timeline = simulated(name, stages, m)
            except ValueError:                                    # fewer micro-batches than it takes
                continue
            for kind, formula in kinds.items():
                points[kind][name].append((m, round(getattr(timeline, f"bubble_of_{kind}"), 12)))
                try:
                    curves[kind][name].append((m, formula(name, stages, m, timeline.schedule.chunks)))
                except ValueError:                                # no closed form
                    pass
    same = {}                                                     # schedules that are equal in both panels are one line
    for name in schedules.NAMES:
        same.setdefault(str([points[kind][name] for kind in kinds]), []).append(name)
    groups = {group[0]: ", ".join(NAMES[name] for name in group) for group in same.values()}
    figure = draw.new(15, 7.6)
    both = figure.subplots(1, 2, sharey=True)
    for axes, kind, title in zip(both, kinds, ("of the step", "of the longest span of a rank")):
        handles = draw.lines(axes, {groups[name]: tuple(zip(*curve)) for name, curve in curves[kind].items() if name in groups and len(curve) > 1},
                             {groups[name]: tuple(zip(*found)) for name, found in points[kind].items() if name in groups},
                             f"Idle share {title}, {stages} ranks", "micro-batches of a step")
        axes.set(xscale="log", ylim=(-0.01, None))
        axes.set_xticks(counts, counts)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    both[0].set_ylabel("idle; points simulated, lines by formula")
    draw.below(figure, handles, 4)
    return figure


def memory(label, stages=8, micro_batches=16):
    """What each rank holds by schedule: activations and copies of weights."""
    held, copies = {}, {}
    for name in schedules.NAMES:
        timeline = simulated(name, stages, micro_batches)
        share = stages / timeline.schedule.model_parts                       # of a rank's usual part of the model, per chunk
        held[NAMES[name]] = [peak * share for peak in timeline.peak_in_flight]
        copies[NAMES[name]] = [count * timeline.schedule.chunks * share for count in timeline.weight_versions]
    figure = draw.new(15, 6.4)
    left, right = figure.subplots(1, 2, sharey=True)
    draw.numbers(left, held, f"Activations held at once, {stages} ranks, {micro_batches} micro-batches", "rank", xnames=range(stages))
    draw.numbers(right, copies, "Copies of the weights", "rank", "#D55E00", xnames=range(stages))
    figure.supxlabel(f"left: micro-batches, each through 1/{stages} of the model; right: 1/{stages} of the model's weights", fontsize=11)
    return figure


def partition_of_vgg16(label, machines=4, bandwidth=1.25e9):
    """Where the planner cuts VGG-16 for a few machines on 10 Gbit/s Ethernet, over the times and sizes of its layers."""
    graph = read_graph(Path(__file__).resolve().parent / "profiles" / "vgg16.txt")
    where, plan = cuts(graph), partition(graph, [machines], [bandwidth], activation_compression_ratio=1)
    nodes = [graph.nodes[name] for name in graph.order() if name in plan.nodes]
    panels = (("Time of a layer, ms", {"forward": "forward", "backward": "backward"}, 1),
              ("Output of a layer, MB: what a cut behind it sends, and as much back", {"": "activation"}, 1e6),
              ("Weights of a layer, MB: what its replicas sum up", {"": "parameters"}, 1e6))
    figure = draw.new(14, 9)
    every = figure.subplots(3, sharex=True)
    for axes, (title, stacks, unit) in zip(every, panels):
        bottom = [0.0] * len(nodes)
        for name, field in stacks.items():
            values = [getattr(node, field) / unit for node in nodes]
            axes.bar(range(len(nodes)), values, bottom=bottom, width=0.8, zorder=3, label=name,
                     color=draw.shade("B") if name == "backward" else "#0072B2")
            bottom = [a + b for a, b in zip(bottom, values)]
        axes.set(title=title, xlim=(-0.5, len(nodes) - 0.5), ylim=(0, 1.5 * max(bottom)))
        axes.grid(False, axis="x")
    every[0].legend(loc="upper right")
    for stage, ((first, last), count) in enumerate(zip(plan.stages, plan.replicas)):
        time, _, weights = (a - b for a, b in zip(where.whole[last - 1], where.whole[first - 1] if first else (0, 0, 0)))
        words = (f"stage {stage}: {count} machine{'s' * (count > 1)}\n{time / count:,.0f} ms a minibatch",
                 f"sends {where.output[last - 1] / 1e6:.1f} MB on" if last < len(where.whole) else "", f"{weights / 1e6:.1f} MB in all")
        for axes, text in zip(every, words):
            axes.axvspan(first - 0.5, last - 0.5, facecolor=draw.LIGHT[stage % len(draw.LIGHT)], alpha=0.35, zorder=0, linewidth=0)
            axes.text(first - 0.3, axes.get_ylim()[1] * 0.96, text, va="top", fontsize=12, fontweight="bold")
    every[-1].set_xticks(range(len(nodes)), [node.description.split("(")[0] for node in nodes], rotation=90, fontsize=10)
    batch = results.read("pipedream/profile_vgg16", label)["settings"]["batch"]
    figure.suptitle(f"VGG-16 on {machines} machines of {bandwidth / 1e9:g} GB/s, minibatches of {batch}: {'-'.join(map(str, plan.replicas))}, "
                    f"{plan.time:.2f} s a minibatch; data parallel {plan.data_parallel_time:.2f} s",
                    x=0.012, ha="left", fontsize=15, fontweight="bold")
    return figure


def measured(label, ranks=4, modes=("flush", "zb_v", "stash")):
    """Simulated over measured: the same operations with the same durations, on paper and on real processes."""
    record = results.read(f"pipedream/benchmark_timeline_{ranks}", label)
    missing = [mode for mode in modes if mode not in record["details"]]
    if missing:
        raise ValueError(f"results/{label}/pipedream/benchmark_timeline_{ranks}.json has no timeline of {', '.join(missing)}: measure it again.")
    figure = draw.new(14, 3.9 * len(modes) + 0.5)
    panels = figure.subplots(2 * len(modes))
    everything = []
    for place, mode in enumerate(modes):
        found = record["details"][mode]
        limit = max(row[4] for kind in ("simulated", "measured") for rank in found[kind] for row in rank)
        for axes, kind in zip(panels[2 * place:], ("simulated", "measured")):
            last = max(row[4] for rank in found[kind] for row in rank)
            draw.timeline(axes, found[kind], limit, f"{NAMES.get(mode, MODES.get(mode))}, {kind}: {last:.3f} s")
            everything += found[kind]
        panels[2 * place + 1].set_xlabel("seconds")
    draw.legend(figure, everything)
    return figure


def convergence(label):
    """Loss of each mode on the same samples, for several learning rates."""
    record = results.read("pipedream/benchmark_convergence", label)
    rates = list(dict.fromkeys(name.split()[1] for name in record["details"]))
    figure = draw.new(15, 6)
    total = record["settings"]["steps"] * record["settings"]["micro_batches"]
    for axes, rate in zip(figure.subplots(1, len(rates), sharey=True, squeeze=False)[0], rates):
        curves = {}
        for mode, name in MODES.items():
            losses = record["details"][f"{mode} {rate}"]
            curves[name] = [total * (k + 0.5) / len(losses) for k in range(len(losses))], [float("nan") if loss is None else loss for loss in losses]
        handles = draw.lines(axes, curves, title=f"learning rate {rate}", xlabel="micro-batches")
    figure.axes[0].set_ylabel("loss, nats: means of windows")
    finite = [loss for curve in record["details"].values() for loss in curve if loss is not None]
    figure.axes[0].set_ylim(min(finite) - 0.05, min(max(finite), max(curve[0] for curve in record["details"].values()) * 1.08))
    draw.below(figure, handles)
    return figure


FIGURES = {"schedules": four_schedules, "phases": phases, "versions": weight_versions, "bubble": bubble, "memory": memory,
           "partition": partition_of_vgg16, "measured": measured, "convergence": convergence}


def main():
    if text := usage(sys.argv[1:], __file__):
        print(text)
        return
    settings = override(CONFIG, sys.argv[1:], "pipedream/pipedream_visual.py")
    names = list(FIGURES) if settings["figures"] == "all" else settings["figures"].split(",")
    if unknown := set(names) - set(FIGURES):
        raise SettingsError(f"figures={','.join(sorted(unknown))}: figures are {', '.join(FIGURES)}.")
    results.check_label(settings["label"])
    for name in names:
        path = figures.save(FIGURES[name](settings["label"]), name, "pipedream", settings["commit"])
        print(f"drawn: {path.relative_to(results.ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except (SettingsError, ValueError, OSError) as error:
        sys.exit(f"pipedream/pipedream_visual.py: {error}")
