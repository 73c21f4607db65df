"""Figures in one style: memory bars, traffic bars, curves, who holds what, and the figure of one run.

A kind of memory is a key "optimizer" or, with a place other than the device that computes, "optimizer@host" or
"optimizer@nvme". A `target` is an Axes to draw on or a path to save a new figure to. The colours are told apart
in the common kinds of colour blindness (Okabe and Ito 2008 for memory, Paul Tol's palettes for the rest).
"""

import pathlib

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from yardstick.results import ROOT

KINDS = {"parameter": "#0072B2", "gradient": "#E69F00", "master": "#009E73", "optimizer": "#D55E00",
         "buffer": "#CC79A7", "activation": "#56B4E9"}
COLLECTIVES = {"all_reduce": "#332288", "reduce_scatter": "#44AA99", "all_gather": "#88CCEE",
               "broadcast": "#999933", "all_to_all": "#AA4499"}
STRATEGIES = {"dp": "#332288", "zero1": "#66AADD", "zero2": "#228833", "zero3": "#CCAA22", "offload": "#EE6677",
              "infinity": "#AA3377"}
OTHER = "#8A8A8A"                                # what has no colour of its own
WHITE = {"facecolor": "white", "edgecolor": "none"}   # behind texts that stand on lines
PLACES = {"": "device memory", "host": "host memory", "nvme": "NVMe files"}
PALER = {"": 0.0, "host": 0.45, "nvme": 0.7}    # share of white in the colour of a kind, by place
SERIES = ("measured", "predicted", "paper")      # bars drawn solid, hatched and outlined
NAMES = {"parameter": "parameters", "gradient": "gradients", "master": "master weights",
         "optimizer": "optimizer states", "buffer": "buffers", "activation": "activations"}
DASHES = ["-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)), (0, (3, 3)), (0, (9, 3))]


def style():
    """Set matplotlib's defaults to the house style: light, readable on a slide, the data darker than the frame."""
    matplotlib.rcParams.update({
        "figure.dpi": 100, "savefig.dpi": 150, "figure.facecolor": "white", "axes.facecolor": "white",
        "font.family": "DejaVu Sans", "font.size": 12, "axes.titlesize": 14, "axes.titlelocation": "left",
        "axes.titleweight": "bold", "axes.titlepad": 10, "axes.labelsize": 12, "legend.fontsize": 11,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666",
        "axes.grid": True, "axes.axisbelow": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.8,
        "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
        "hatch.linewidth": 1.2, "hatch.color": "white"})


def save(figure, name, folder=".", commit=False):
    """Save as FOLDER/images/NAME.png when `commit`, else as runs/figures/FOLDER/NAME.png; returns the path.

    folder: relative to the root of the repository, or inside it.
    """
    folder = (ROOT / folder).relative_to(ROOT)
    base = ROOT / folder / "images" if commit else ROOT / "runs" / "figures" / folder
    return _save(figure, base / f"{name}.png")


def memory_bars(target, rows, second=None, third=None, names=SERIES, title=""):
    """Stacked bars of bytes by kind: rows = {label: {kind: bytes}}; `second` and `third`, of the same form, stand
    below each row's first bar, hatched and outlined."""
    return _on(target, lambda axes: _bars(axes, (rows, second, third), names, title), rows, second, third)


def traffic_bars(target, rows, second=None, third=None, names=SERIES, title="", P=None):
    """Stacked bars of bytes sent by collective: rows = {label: {collective: bytes}}, `second` and `third` alike.

    P: what a rank sends to pass all parameters around the ring once, in whose multiples the papers count; draws
    lines at 1P, 2P, 3P.
    """
    def draw(axes):
        most, size = _bars(axes, (rows, second, third), names, title)
        if P:
            axes.grid(False)
            bottom, top = axes.get_ylim()
            axes.set(ylim=(bottom, top - 0.6), xlim=(0, max(axes.get_xlim()[1], 3.2 * P / size)))
            for multiple in range(1, max(3, round(most / P)) + 1):
                axes.axvline(multiple * P / size, color="#666666", linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
                axes.text(multiple * P / size, top - 0.15, f"{multiple}P", ha="center", va="center", fontsize=10.5,
                          bbox={**WHITE, "pad": 1.5})
    return _on(target, draw, rows, second, third)


def curves(target, lines, xlabel="step", ylabel="loss (nats)", title=""):
    """Lines {label: [values]} over 1, 2, ...; on a figure of its own, the distance of each to the first below.

    Lines that lie on one another stay visible: the first is the widest, later ones are thinner and dashed.
    """
    figure, axes, below = None, target, ()
    if not isinstance(target, matplotlib.axes.Axes):
        several = len(lines) > 1
        figure = _new(9, 6.5 if several else 4.5)
        axes, *below = figure.subplots(1 + several, sharex=True, squeeze=False,
                                       height_ratios=(3, 2)[:1 + several])[:, 0]
        if below:
            _differences(below[0], lines)
            below[0].set_xlabel(xlabel)
    for i, (label, values) in enumerate(lines.items()):
        axes.plot(np.arange(1, len(values) + 1), values, label=label, **_line(label, i, len(lines)))
    axes.set(ylabel=ylabel, title=title, xlabel="" if below else xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, steps=[1, 2, 5, 10]))
    if len(lines) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), handlelength=3.2)
    return _save(figure, target) if figure else axes


def who_holds_what(path, ranks, rows, weights=None, title=""):
    """The picture of which rank holds what: a column per rank, a shelf per place, a bar per kind.

    rows: {kind or kind@place: "full" or "sharded"}: each rank holds the whole, or its slice of it (filled, at
    its position; what the other ranks hold is the pale outline).
    weights: {kind: bytes per parameter}; bars are as high as that, and say it.
    """
    weights = weights or {}
    heights = {key: 0.3 + 0.085 * weights.get(_split(key)[0], 2) for key in rows}
    gap, column, left = 0.16, 2.0, 2.55                            # inches, as are all lengths below
    shelves = {place: [key for key in rows if _split(key)[1] == place]
               for place in PLACES if any(_split(key)[1] == place for key in rows)}
    shelf = {place: sum(heights[key] + gap for key in keys) + gap for place, keys in shelves.items()}
    top, between, foot = 0.95 if title else 0.55, 0.16, 0.5
    wide, high = left + ranks * column + 0.2, top + sum(shelf.values()) + between * (len(shelves) - 1) + foot
    figure = _new(wide, high, layout=None)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, wide), ylim=(high, 0))
    axes.axis("off")
    axes.text(0.15, 0.3, title, fontsize=14, fontweight="bold", va="center")
    for rank in range(ranks):
        axes.text(left + (rank + 0.5) * column, top - 0.12, f"rank {rank}", ha="center", fontweight="bold")
    y = top
    for place, keys in shelves.items():
        axes.add_patch(Rectangle((0.1, y), wide - 0.2, shelf[place], facecolor="#F4F4F4", edgecolor="#CCCCCC"))
        axes.text(0.42, y + shelf[place] / 2, PLACES[place].replace(" ", "\n"), rotation=90, color="#555555",
                  ha="center", va="center", multialignment="center", fontsize=10, linespacing=1.1)
        for key in keys:
            y += gap
            kind = _split(key)[0]
            size = f"\n{weights[kind]:g} bytes per parameter" if kind in weights else ""
            axes.text(left - 0.1, y + heights[key] / 2, NAMES.get(kind, kind) + size, ha="right", va="center",
                      fontsize=10, linespacing=1.2)
            for rank in range(ranks):
                _slice(axes, left + rank * column + 0.1, y, column - 0.2, heights[key], rank, ranks,
                       rows[key], KINDS.get(kind, OTHER))
            y += heights[key]
        y += gap + between
    axes.text(left + 0.1, high - foot / 2, "filled: this rank holds it;  outlined: other ranks do", va="center",
              fontsize=10, color="#555555")
    return _save(figure, path)


def run_figure(record, path):
    """The figure of one run: memory by kind, traffic by collective, each measured beside predicted, and the loss.

    record: as yardstick.results writes it, with details["memory"] = {moment: {"measured": {kind: bytes},
    "predicted": ..., "paper": ...}}, details["traffic"] = {"measured": {collective: ring bytes}, "predicted": ...,
    "weights_bytes": of all ranks}, details["loss"] = [nats]. What is missing is not drawn.
    """
    details, settings = record.get("details", {}), record.get("settings", {})
    memory, traffic, loss = (details.get(name) or {} for name in ("memory", "traffic", "loss"))
    ranks = record.get("machine", {}).get("ranks")
    sent = [{"one step": traffic[name]} if traffic.get(name) else {} for name in SERIES]
    columns = ["memory"] * bool(memory) + ["traffic"] * any(sent)
    layout = [columns] * bool(columns) + [["loss"] * max(1, len(columns))] * bool(loss)
    if not layout:
        raise ValueError(f"nothing to draw: the record of {record.get('run')} has no details of a run.")
    figure = _new(14, (4.6 if columns else 0.6) + (3.2 if loss else 0))
    panels = figure.subplot_mosaic(layout, height_ratios=[4.6, 3.2][-len(layout):])
    if memory:
        moments = {moment: {"rest": "at rest"}.get(moment, moment.replace("_", " ")) for moment in memory}
        memory_bars(panels["memory"], title="Memory of one rank (the most of any)", *(
            {moments[moment]: part[name] for moment, part in memory.items() if name in part} for name in SERIES))
    if any(sent):
        traffic_bars(panels["traffic"], *sent, title="Sent by one rank in a step",
                     P=traffic.get("weights_bytes", 0) * (ranks - 1) / ranks if ranks else None)
    if loss:
        curves(panels["loss"], {settings.get("strategy", "loss"): loss}, title="Training loss")
    facts = settings.get("strategy"), settings.get("model"), f"{ranks} ranks" if ranks else None
    figure.suptitle(", ".join(filter(None, facts)), x=0.012, ha="left", fontsize=16, fontweight="bold")
    return _save(figure, path)


def _new(width, height, layout="constrained"):
    style()
    return Figure(figsize=(width, height), layout=layout)


def _save(figure, path):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})   # and no date: an equal figure is an equal file
    return path


def _on(target, draw, rows, *others):
    """Draw bars on an Axes and return it, or on a figure of their own, which is saved to the path `target`."""
    if isinstance(target, matplotlib.axes.Axes):
        draw(target)
        return target
    figure = _new(10, 2.6 + len(rows) * (0.3 + 0.33 * (1 + sum(bool(other) for other in others))))
    draw(figure.subplots())
    return _save(figure, target)


def _unit(most):   # (name, bytes)
    units = ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 0)
    return next((name, size or 1) for name, size in units if most >= size)


def _split(key):
    kind, _, place = key.partition("@")
    return kind, place


def _order(key):
    """Sorting key of kinds: by place, then in the order of their tables, then by name."""
    kind, place = _split(key)
    known = [*KINDS, *COLLECTIVES]
    return list(PLACES).index(place), known.index(kind) if kind in known else len(known), kind


def _colour(key):
    kind, place = _split(key)
    white = PALER[place]
    return tuple(white + (1 - white) * channel for channel in to_rgb({**KINDS, **COLLECTIVES}.get(kind, OTHER)))


def _bars(axes, series, names, title):
    """Horizontal stacks, device memory first. Returns the bytes of the longest one and of the axis' unit."""
    series = [part for part in zip(series, names, ("solid", "hatched", "outlined")) if part[0]]
    if not series:
        raise ValueError(f"nothing to draw: no rows for the bars {title!r}.")
    labels = list(dict.fromkeys(label for rows, _, _ in series for label in rows))
    stacks = [stack for rows, _, _ in series for stack in rows.values()]
    most = max((sum(stack.values()) for stack in stacks), default=0) or 1
    keys = sorted({key for stack in stacks for key in stack if stack[key] > most / 1000}, key=_order)   # visible
    unit, size = _unit(most)
    pitch = len(series) + 0.7                                      # bars are 1 high
    for s, (rows, _, look) in enumerate(series):
        for y, stack in ((labels.index(label) * pitch + s, rows[label]) for label in labels if label in rows):
            left = 0.0
            for key in (key for key in keys if stack.get(key)):
                axes.barh(y, stack[key] / size, left=left, height=0.8 if look == "outlined" else 0.86,
                          **_look(look, _colour(key)))
                left += stack[key] / size
            axes.annotate(f"{sum(stack.values()) / size:.3g} {unit}", (left, y), xytext=(6, 0), va="center",
                          fontsize=10.5, textcoords="offset points", bbox={**WHITE, "pad": 1})
    low, high = -0.7, (len(labels) - 1) * pitch + len(series) - 0.3
    room = max(0.0, 5 - (high - low)) / 2                          # a few bars do not become slabs
    axes.set(xlabel=unit, title=title, ylim=(high + room, low - room), xlim=(0, most / size * 1.17))
    axes.set_yticks([i * pitch + (len(series) - 1) / 2 for i in range(len(labels))], labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    handles = [Patch(facecolor=_colour(kind), label=NAMES.get(kind, kind.replace("_", "-")))
               for kind in sorted({_split(key)[0] for key in keys}, key=_order)]
    handles += [Patch(facecolor=[0.4 + 0.6 * PALER[place]] * 3, label=f"paler: in {PLACES[place]}")
                for place in sorted({_split(key)[1] for key in keys} - {""})]
    if len(series) > 1:
        handles += [Patch(label=name, **_look(look, OTHER)) for _, name, look in series]
    axes.legend(handles=handles, ncols=3, loc="upper left", bbox_to_anchor=(0, 0), borderpad=0, handlelength=1.6,
                columnspacing=1.6, bbox_transform=axes.transAxes + ScaledTranslation(
                    0, -0.62, axes.get_figure().dpi_scale_trans))  # inches below the axis
    return most, size


def _look(look, colour):
    return {"solid": {"facecolor": colour}, "hatched": {"facecolor": colour, "hatch": "///"},
            "outlined": {"facecolor": "white", "edgecolor": colour, "linewidth": 2}}[look]


def _line(label, i, count):
    """Colour, width and dash of line i: wide and pale below, thin and dashed on top."""
    return {"color": STRATEGIES.get(label, list(STRATEGIES.values())[i % len(STRATEGIES)]),
            "linewidth": 1.8 + 4.2 * (count - 1 - i) / max(1, count - 1) if count > 1 else 2.5,
            "linestyle": DASHES[i % len(DASHES)], "alpha": 0.45 if i == 0 and count > 1 else 1.0}


def _differences(axes, lines):
    """|line - first line| on a log scale; exact equality, which has no logarithm, is drawn on the axis' floor."""
    (first, base), *others = lines.items()
    distances = {label: np.abs(np.array(values[:len(base)], float) - np.array(base[:len(values)], float))
                 for label, values in others}
    positive = [d for distance in distances.values() for d in distance if np.isfinite(d) and d > 0] or [1e-9]
    floor, most = 10.0 ** (np.floor(np.log10(min(positive))) - 1), 3 * max(positive)
    for i, (label, distance) in enumerate(distances.items(), 1):
        axes.plot(np.arange(1, len(distance) + 1), np.maximum(distance, floor), marker="o", markersize=4,
                  clip_on=False, **{**_line(label, i, len(lines)), "linewidth": 1.6})
    axes.set(yscale="log", ylim=(floor, most), ylabel=f"distance to {first}")
    ticks = [tick for tick in axes.get_yticks() if 30 * floor < tick <= most]
    axes.set_yticks([floor, *ticks], ["equal", *(f"$10^{{{round(np.log10(tick))}}}$" for tick in ticks)])
    axes.minorticks_off()


def _slice(axes, x, y, width, height, rank, ranks, how, colour):
    """One bar of one rank: filled whole, or a pale outline cut in `ranks` with the rank's own part filled."""
    if how not in ("full", "sharded"):
        raise ValueError(f"who_holds_what draws \"full\" or \"sharded\", not {how!r}.")
    part = width / ranks
    if how == "sharded":
        axes.add_patch(Rectangle((x, y), width, height, facecolor="white", edgecolor=colour, alpha=0.55))
        for cut in range(1, ranks):
            axes.plot([x + cut * part] * 2, [y, y + height], color=colour, alpha=0.35, linewidth=0.8)
        x, width = x + rank * part, part
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=colour, linewidth=1))
