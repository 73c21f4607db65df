"""Figures of pipelines: timelines of ranks, tables of numbers in colour, lines with points on them.

    figure = new(12, 6)
    axes = figure.subplots()
    timeline(axes, rows, title="1F1B")             # rows: per rank [[kind, micro-batch, chunk, start, end, version], ...]
    legend(figure, rows)
    figures.save(figure, "schedule", "pipedream")

Kinds: F forward, B backward, I and W its two halves. Shades of a kind are the rank's model parts (chunks), the first one palest.
Two operations of a rank with one start are a pair that overlaps: each is half as high. Colours are those of Okabe and Ito 2008 and
Paul Tol, told apart in the common kinds of colour blindness; what they say stands in the boxes, too.
"""

from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from yardstick import figures

KINDS = {"F": "#0072B2", "B": "#E69F00", "I": "#E69F00", "W": "#009E73"}
WORDS = {"F": "forward", "B": "backward", "I": "gradient of the input (I)", "W": "gradient of the weights (W)"}
IDLE = "#EDEDED"
SERIES = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#666666")
MARKERS = "os^Dv*PXdh"
LIGHT = ("#77AADD", "#EE8866", "#EEDD88", "#44BB99", "#FFAABB", "#99DDFF", "#BBCC33", "#CCCCCC")   # pale enough for black words


def new(width, height):
    """A figure in the house style; inches."""
    figures.style()
    return Figure(figsize=(width, height), layout="constrained")


def shade(kind, chunk=0, chunks=1):
    """The colour of an operation: of a rank's several parts the first is palest."""
    white = 0.4 if chunks == 1 else 0.62 - 0.62 * chunk / (chunks - 1)
    return tuple(white + (1 - white) * channel for channel in to_rgb(KINDS[kind]))


def ink(colour):
    """Black or white, whichever is read more easily on a colour."""
    red, green, blue = to_rgb(colour)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"


def timeline(axes, rows, limit=None, title="", colour=None, label=None, names=None):
    """Draw rows of operations, the first rank on top.

    limit: the right end of the axis, in the unit of the rows' times; without it the last end. colour(row), label(row): in place of
    kind and chunk, and of the micro-batch's number; a label may have several lines. names: of the ranks.
    """
    limit = limit or max(row[4] for rank in rows for row in rank)
    chunks = 1 + max(row[2] for rank in rows for row in rank)
    points = 72 * 0.9 * axes.get_figure().get_figwidth() / limit                      # of a unit of time, about
    for y, rank in enumerate(rows):
        starts = [row[3] for row in rank]
        axes.add_patch(Rectangle((0, y - 0.44), limit, 0.88, facecolor=IDLE, edgecolor="none"))
        for row in rank:
            kind, k, chunk, start, end = row[:5]
            paired = starts.count(start) == 2 and end > start
            bottom, height = (y - 0.44 + 0.44 * (kind != "F"), 0.44) if paired else (y - 0.44, 0.88)
            fill = colour(row) if colour else shade(kind, chunk, chunks)
            axes.add_patch(Rectangle((start, bottom), end - start, height, facecolor=fill, edgecolor="white", linewidth=0.7))
            text = label(row) if label else str(k)
            size = min(8 if paired else 11, points * (end - start) / (0.7 * max(map(len, text.split("\n")))))
            if size >= 5:
                axes.text((start + end) / 2, bottom + height / 2, text, ha="center", va="center_baseline" if "\n" not in text else "center",
                          fontsize=size, color=ink(fill), linespacing=1.0)
    axes.set(xlim=(0, limit), ylim=(len(rows) - 0.4, -0.6), title=title)
    axes.set_yticks(range(len(rows)), names or [f"rank {rank}" for rank in range(len(rows))])
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    axes.spines["left"].set_visible(False)


def legend(figure, rows, ncols=7):
    """A legend below a figure: the kinds of operations in rows, shades where a rank has several parts, idle time."""
    kinds = {row[0] for rank in rows for row in rank}
    chunks = 1 + max(row[2] for rank in rows for row in rank)
    handles = [Patch(facecolor=shade("F"), label=WORDS["F"])]
    if back := kinds & {"B", "I"}:
        handles.append(Patch(facecolor=shade("B"), label="backward, or its part for the input" if len(back) == 2 else WORDS[min(back)]))
    if "W" in kinds:
        handles.append(Patch(facecolor=shade("W"), label=WORDS["W"]))
    if chunks > 1:
        handles += [Patch(facecolor=shade("F", 0, chunks), label="paler: first model part of a rank"),
                    Patch(facecolor=shade("F", chunks - 1, chunks), label="darker: its last")]
    below(figure, [*handles, Patch(facecolor=IDLE, label="idle")], ncols)


def below(figure, handles, ncols=7):
    """Handles, or {name: colour}, as the legend below a figure."""
    if isinstance(handles, dict):
        handles = [Patch(facecolor=colour, label=name) for name, colour in handles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(ncols, len(handles)), columnspacing=1.4, handlelength=1.6)


def numbers(axes, rows, title="", xlabel="", colour="#0072B2", form="{:g}", xnames=None):
    """A table in colour: {name: [number per column]}; the larger, the darker."""
    most = max(max(row) for row in rows.values())
    shades = LinearSegmentedColormap.from_list("", ["#FFFFFF", colour])
    axes.imshow(list(rows.values()), aspect="auto", cmap=shades, vmin=0, vmax=most * 1.15)
    for y, row in enumerate(rows.values()):
        for x, value in enumerate(row):
            axes.text(x, y, form.format(value), ha="center", va="center_baseline", fontsize=11, color=ink(shades(value / most / 1.15)[:3]))
    axes.set(title=title, xlabel=xlabel)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xticks(range(len(xnames)), xnames)
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def lines(axes, curves, points=None, title="", xlabel="", ylabel=""):
    """Curves {name: (xs, ys)}, points {name: (xs, ys)} in the look of their name's place -> handles of the legend, highest first.

    Of curves that lie on one another the first is the widest, and its points are the largest.
    """
    points, found = points or {}, []
    names = list(dict.fromkeys([*points, *curves]))
    for n, name in enumerate(names):
        thin = n / max(1, len(names) - 1)
        look = {"color": SERIES[n % len(SERIES)], "linewidth": 3.4 - 1.5 * thin, "linestyle": figures.DASHES[n % len(figures.DASHES)]}
        dot = {"marker": MARKERS[n % len(MARKERS)], "markersize": 9.5 - 3.0 * thin, "markeredgecolor": "white", "markeredgewidth": 0.6}
        if name in curves:
            axes.plot(*curves[name], **look)
        if name in points:
            axes.plot(*points[name], **{**look, **dot, "linestyle": "none"})
        height = (points[name] if name in points else curves[name])[1][0]
        found.append((-height, n, Line2D([], [], **{**look, **(dot if name in points else {}), **({} if name in curves else {"linestyle": "none"})},
                                         label=name)))
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return [handle for *_, handle in sorted(found, key=lambda one: one[:2])]
