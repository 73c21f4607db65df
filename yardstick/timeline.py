"""A timeline: a recorder of what runs and of what is sent meanwhile, and the picture of both, as a figure and as text.

    recorder = Recorder()
    recorder.modules(model, {"0": "first", "2": "second"})
    dist.all_reduce = recorder.sending(dist.all_reduce, "sum")
    output = recorder.passes(model, (x,), torch.ones_like(x))
    print(report(recorder, {"first": "1", "second": "2", "waits": "w", "sum": "="}))

Times are seconds of the host's clock. On a GPU that is when work is launched, not when the device does it. A row of a picture
is [(begin, end, name)], in seconds from where its phase begins.
"""

import contextlib
import math
import time
from dataclasses import dataclass

from matplotlib.patches import Patch

from yardstick import figures

NODES = {"NativeLayerNorm": "norm", "ScaledDot": "attention", "Gelu": "gelu", "AddBackward": "residual", "MmBackward": None,
         "AddmmBackward": None, "Linear": None}              # {part of the name of an autograd node: kind of work}
COLOURS = ("#BBBBBB", "#4477AA", "#66CCEE", "#228833", "#CCBB44", "#DDDDDD", "#EE8866", "#999999", "#CC3311", "#332288", "#AA4499")


@dataclass
class Sent:
    """A collective: its name, behind which work (`after`, and its autograd node) it was issued, and when.

    done: when it was, or inf where the host does not learn that. waits, goes_on: the time in which the host stood still for it.
    """

    name: str
    after: str
    node: object
    bytes: int
    issued: float
    done: float = math.inf
    waits: float = math.inf
    goes_on: float = math.inf


class Recorder:
    """ran: [(name, autograd node, begin, end)], sent: [Sent], lanes: {autograd node: number of the top that it lies below}."""

    def __init__(self):
        self._owners = {}
        self.clear()

    def clear(self):
        self.ran, self.sent, self.lanes, self.phases = [], [], {}, {}
        self._name, self._node, self._begin = None, None, 0.0

    def passes(self, module, inputs, gradient, count=5):
        """Run a module forward, and backward from `gradient`, `count` times, and keep the record of the quickest -> its output.

        The quickest is the least disturbed by what else the machine does; gradients are those of one pass. The lanes are what
        the output's last operation takes in, for example the halves that it joins.
        """
        records = []
        for _ in range(count):
            self.clear()
            module.zero_grad()
            for each in inputs:
                if getattr(each, "requires_grad", False):
                    each.grad = None
            with self._phase("forward"):
                output = module(*inputs)
            self.follow([node for node, _ in output.grad_fn.next_functions if node])
            with self._phase("backward"):
                output.backward(gradient)
            records.append((sum(end - begin for begin, end in self.phases.values()), self.ran, self.sent, self.lanes, self.phases))
        _, self.ran, self.sent, self.lanes, self.phases = min(records, key=lambda record: record[0])
        return output.detach()

    @contextlib.contextmanager
    def _phase(self, name):
        begin = time.perf_counter()
        yield
        self.phases[name] = begin, time.perf_counter()

    def timed(self, name, function):
        """`function`, recorded as `name` whenever it is called; its node is that of its output, or of the first of them."""
        def call(*arguments, **keywords):
            begin = time.perf_counter()
            output = function(*arguments, **keywords)
            end = time.perf_counter()
            self._name, self._node = name, (output[0] if isinstance(output, tuple) else output).grad_fn
            self.ran.append((name, self._node, begin, end))
            return output
        return call

    def modules(self, model, names):
        """Record the forward of some parts of a module, {path: name}; `follow` knows their backward by their parameters."""
        for path, name in names.items():
            part = model.get_submodule(path)
            part.forward = self.timed(name, part.forward)
            self._owners |= dict.fromkeys(part.parameters(), name)

    def sending(self, collective, name):
        """`collective`, recorded as `name` when it is called with async_op=True and when its handle is waited for."""
        def call(tensor, **keywords):
            one = Sent(name, self._name, self._node, tensor.nbytes, time.perf_counter())
            work = collective(tensor, **keywords)
            self.sent.append(one)
            if tensor.device.type == "cpu":
                work.get_future().add_done_callback(lambda _: setattr(one, "done", time.perf_counter()))
            return _Handle(work, one)
        return call

    def follow(self, tops, kinds=NODES):
        """Walk down from each autograd node of `tops`, note which nodes lie below which, and record the backward of some.

        kinds: {part of a node's name: name to record it as}. None: that of the part in `modules` whose parameter it uses, if any.
        """
        for lane, top in enumerate(tops):
            stack = [top]
            while stack:
                node = stack.pop()
                if node in self.lanes:
                    continue
                self.lanes[node] = lane
                below = [other for other, _ in node.next_functions if other]
                stack += below
                for name in (name for part, name in kinds.items() if part in node.name()):
                    below += [other for one in below for other, _ in one.next_functions]
                    used = [self._owners.get(one.variable) for one in below if hasattr(one, "variable")]
                    if name or any(used):
                        self._watch(node, name or next(filter(None, used)))

    def _watch(self, node, name):
        def before(_):
            self._name, self._node, self._begin = name, node, time.perf_counter()
        node.register_prehook(before)
        node.register_hook(lambda *_: self.ran.append((name, node, self._begin, time.perf_counter())))

    def behind(self, one, names):
        """[(lane, name)] of the work of such names that ran between a collective's start and the moment when it was waited for."""
        return [(self.lanes[node], name) for name, node, begin, end in self.ran
                if name in names and begin < one.waits and end > one.issued]

    def hidden(self, phase, names):
        """How many collectives of a phase travel while such work of another lane runs."""
        return sum(any(lane != self.lanes[one.node] for lane, _ in self.behind(one, names)) for one in self.of(phase))

    def of(self, phase):
        """[Sent] of one phase."""
        begin, end = self.phases[phase]
        return [one for one in self.sent if begin <= one.issued < end]

    def rows(self, phase, lane="lane {}"):
        """The rows of one phase: for each lane what it computes, and when the host "waits" for it; and what it sends."""
        first, last = self.phases[phase]
        rows = {f"{lane.format(number)} {what}": [] for number in sorted(set(self.lanes.values())) for what in ("computes", "sends")}
        for name, node, begin, end in self.ran:
            if first <= begin < last:
                rows[f"{lane.format(self.lanes[node])} computes"].append((begin - first, end - first, name))
        for one in self.of(phase):
            row = lane.format(self.lanes[one.node])
            rows[f"{row} sends"].append((one.issued - first, min(one.done, one.goes_on, last) - first, one.name))
            if one.goes_on < math.inf:
                rows[f"{row} computes"].append((one.waits - first, one.goes_on - first, "waits"))
        return rows


@dataclass
class _Handle:
    work: object
    one: Sent

    def wait(self):
        self.one.waits = time.perf_counter()
        self.work.wait()
        self.one.goes_on = time.perf_counter()


def text(rows, letters, columns=96):
    """Lines of text, a letter of {name: letter} per column: what took most of that column's time, or - where nothing did.

    >>> for line in text({"half 0": [(0, 1, "norm"), (2, 4, "qkv")]}, {"norm": "n", "qkv": "q"}, columns=4):
    ...     print(line)
    half 0 |n-qq|
    """
    last, width = max(end for spans in rows.values() for _, end, _ in spans), max(map(len, rows))
    lines = []
    for label, spans in rows.items():
        marks = []
        for left, right in ((column * last / columns, (column + 1) * last / columns) for column in range(columns)):
            shares = {"-": (right - left) / 4}               # what takes less than a quarter is not shown
            for begin, end, name in spans:
                shares[letters[name]] = shares.get(letters[name], 0.0) + max(0.0, min(end, right) - max(begin, left))
            marks.append(max(shares, key=shares.get))
        lines.append(f"{label:<{width}} |{''.join(marks)}|")
    return lines


def report(recorder, letters, names=(), lane="lane {}", path=None, title=""):
    """The phases of a recorder as text, and a table of what was sent; with a path, drawn there too.

    letters: {name: letter}. names: the work that a collective is said to hide behind, where it runs while that travels.
    """
    lines, panels = ["letters: " + ", ".join(f"{letter} {name}" for name, letter in letters.items())], {}
    for phase in recorder.phases:
        panels[phase] = recorder.rows(phase, lane)
        begin, end = recorder.phases[phase]
        lines += [f"{phase}, {1e3 * (end - begin):.1f} ms", *text(panels[phase], letters)]
    lines.append(f"{'sent in':<9} {'by':<10} {'after':<10} {'at ms':>7} {'travels ms':>11} {'waited for ms':>14}   meanwhile")
    for phase, (begin, _) in recorder.phases.items():
        for one in recorder.of(phase):
            work = ", ".join(f"{lane.format(number)} {name}" for number, name in recorder.behind(one, names)) or "nothing"
            lines.append(f"{phase:<9} {lane.format(recorder.lanes[one.node]):<10} {one.after:<10} {1e3 * (one.issued - begin):>7.2f} "
                         f"{1e3 * (min(one.done, one.goes_on) - one.issued):>11.2f} {1e3 * (one.goes_on - one.waits):>14.2f}   {work}")
    if path:
        draw(path, panels, list(letters), title)
    return "\n".join(lines)


def draw(path, panels, names, title="", width=15.0):
    """Draw panels {title: rows} below each other, on one scale of time, and save the figure to `path`.

    names: of spans, in the order of their colours. A span that is wide enough carries its name; the legend has all of them.
    """
    figures.style()
    figure = figures.Figure(figsize=(width, 1.5 + sum(0.5 * len(rows) + 0.75 for rows in panels.values())), layout="constrained")
    colours = dict(zip(names, COLOURS))
    last = 1e3 * max(end for rows in panels.values() for spans in rows.values() for _, end, _ in spans)
    letter = last * 0.085 / (width - 2.2)                    # milliseconds that a letter of a name is wide
    heights = [len(rows) for rows in panels.values()]
    for axes, (name, rows) in zip(figure.subplots(len(panels), squeeze=False, sharex=True, height_ratios=heights)[:, 0], panels.items()):
        for y, spans in enumerate(rows.values()):
            for begin, end, kind in spans:
                axes.barh(y, 1e3 * (end - begin), left=1e3 * begin, height=0.78, facecolor=colours[kind], edgecolor="white", linewidth=0.6)
                if 1e3 * (end - begin) > letter * (len(kind) + 1):
                    axes.text(500 * (begin + end), y, kind, ha="center", va="center", fontsize=10, color=_ink(colours[kind]))
        axes.set_yticks(range(len(rows)), rows)
        axes.set(ylim=(len(rows) - 0.45, -0.55), xlim=(0, last * 1.005), title=name)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
    axes.set_xlabel("milliseconds")
    used = {kind for rows in panels.values() for spans in rows.values() for _, _, kind in spans}
    figure.legend(handles=[Patch(facecolor=colours[kind], label=kind) for kind in names if kind in used],
                  loc="outside lower center", ncols=len(used))
    figure.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})        # and no date: an equal figure is an equal file
    return path


def _ink(colour):
    """Black or white, whichever is read more easily on a colour."""
    red, green, blue = figures.to_rgb(colour)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
