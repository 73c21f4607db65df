"""PipeDream's profile of a model: a graph of layers with times and sizes, its text format, and where it can be cut.

A line per node, then a line per edge that begins with a tab:

    node5 -- Conv2d(3, 64) -- forward_compute_time=1.5, backward_compute_time=3.0, activation_size=4096.0, parameter_size=256.0
    <tab>node4 -- node5

Times are milliseconds of one minibatch, sizes bytes; an activation_size may be a list [a; b], which is summed. This is the format
of github.com/msr-fiddle/pipedream, whose profiles can be read and whose optimizer reads ours.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

NODE = re.compile(r"(\S+) -- (.*?) -- (forward_compute_time=.*?)(?: -- stage_id=(\d+))?$")
FIELDS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")


@dataclass
class Node:
    """A layer. forward, backward: milliseconds of a minibatch; activation, parameters: bytes."""

    name: str
    description: str
    forward: float = 0.0
    backward: float = 0.0
    activation: float = 0.0
    parameters: float = 0.0
    stage: int | None = None

    def __str__(self):
        numbers = zip(FIELDS, (self.forward, self.backward, self.activation, self.parameters))
        stage = "" if self.stage is None else f" -- stage_id={self.stage}"
        return f"{self.name} -- {' '.join(self.description.split())} -- " + ", ".join(f"{key}={value:.3f}" for key, value in numbers) + stage


@dataclass
class Graph:
    """nodes: {name: Node}; after[name], before[name]: names of the nodes that take its output, and that it takes."""

    nodes: dict = field(default_factory=dict)
    after: dict = field(default_factory=dict)
    before: dict = field(default_factory=dict)

    def add(self, node, inputs=()):
        self.nodes[node.name] = node
        self.after.setdefault(node.name, [])
        self.before.setdefault(node.name, [])
        for name in inputs:
            self.after[name].append(node.name)
            self.before[node.name].append(name)

    def without(self, unwanted):
        """A copy without some nodes and their edges."""
        keep = Graph()
        for name, node in self.nodes.items():
            if name not in unwanted:
                keep.nodes[name] = node
                keep.after[name] = [other for other in self.after[name] if other not in unwanted]
                keep.before[name] = [other for other in self.before[name] if other not in unwanted]
        return keep

    def __str__(self):
        edges = [f"\t{source} -- {name}" for name in self.nodes for source in self.before[name]]
        return "\n".join([*map(str, self.nodes.values()), *edges]) + "\n"

    def order(self):
        """Names so that every node stands after what it takes. Raises ValueError for a cycle, naming one."""
        waits = {name: len(before) for name, before in self.before.items()}
        ready, found = [name for name in self.nodes if not waits[name]], []
        while ready:
            name = ready.pop()
            found.append(name)
            for other in self.after[name]:
                waits[other] -= 1
                if not waits[other]:
                    ready.append(other)
        if len(found) < len(self.nodes):
            name, seen = next(name for name in self.nodes if waits[name]), []
            while name not in seen:
                seen.append(name)
                name = next(other for other in self.before[name] if waits[other])
            raise ValueError(f"the graph has a cycle: {' <- '.join([*seen[seen.index(name):], name])}. A profile must be acyclic.")
        return found


def read_graph(path):
    """The Graph of a profile's text file. Raises ValueError for what is no such file, naming the line."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the profile {path}: {error}") from None
    graph, edges = Graph(), []
    for number, line in enumerate(lines, 1):
        if line.startswith("\t"):
            ends = line.strip().split(" -- ")
            if len(ends) != 2:
                raise ValueError(f"{path}:{number}: an edge is <tab>NODE -- NODE, not {line.strip()!r}.")
            edges.append((number, *ends))
        elif line.strip():
            match = NODE.match(line.strip())
            values = dict(part.split("=", 1) for part in match[3].split(", ") if "=" in part) if match else {}
            if set(FIELDS) - set(values):
                raise ValueError(f"{path}:{number}: a node is NAME -- DESCRIPTION -- {'=..., '.join(FIELDS)}=...; is the file cut off?")
            try:
                numbers = [sum(float(part) for part in values[key].strip("[]").split(";") if part.strip()) for key in FIELDS]
            except ValueError:
                raise ValueError(f"{path}:{number}: one of {', '.join(FIELDS)} is no number.") from None
            if min(numbers) < 0:
                raise ValueError(f"{path}:{number}: a time or a size is negative.")
            graph.add(Node(match[1], match[2], *numbers, int(match[4]) if match[4] else None))
    if not graph.nodes:
        raise ValueError(f"{path} holds no node of a profile.")
    for number, source, name in edges:
        if missing := {source, name} - set(graph.nodes):
            raise ValueError(f"{path}:{number}: an edge names {', '.join(sorted(missing))}, which is no node of the file; is it cut off?")
        graph.after[source].append(name)
        graph.before[name].append(source)
    graph.order()
    return graph


def write_graph(graph, path):
    Path(path).write_text(str(graph), encoding="utf-8")


@dataclass
class Cuts:
    """Where a graph can be cut in two. States are numbered so that each stands after its ancestors.

    whole[j]: (milliseconds, activation bytes, parameter bytes) of all nodes up to and including state j; output[j]: bytes that cross a
    cut behind it; ancestors[j]: states that a cut before j may stand at; nodes[j]: names up to and including state j.
    """

    whole: list
    output: list
    ancestors: list
    nodes: list


def cuts(graph):
    """The Cuts of a graph: SOSP'19 section 3.1 for a chain; for branches the antichains of the authors' released optimizer.

    The input and unused results are taken out first, as there: the input belongs to the first stage whatever the cut.
    """
    graph = graph.without({name for name, node in graph.nodes.items()
                           if not graph.before[name] and node.description.startswith("Input")
                           or not graph.after[name] and node.description.startswith("__getitem__")})
    if not graph.nodes:
        raise ValueError("the profile has no node but its input: there is nothing to cut.")
    order = graph.order()
    bit = {name: 1 << n for n, name in enumerate(order)}
    names = {value: name for name, value in bit.items()}
    above, below = {}, {}                              # bit sets of ancestors and of descendants
    for name in order:
        above[name] = _union(above[other] | bit[other] for other in graph.before[name])
    for name in reversed(order):
        below[name] = _union(below[other] | bit[other] for other in graph.after[name])

    def augmented(antichain):
        """With the ancestors whose output goes somewhere else, too: it crosses the cut as well."""
        extra = {other for name in antichain for other in _members(above[name], names)
                 if any(not bit[out] & above[name] and out != name for out in graph.after[other])}
        return frozenset(antichain) | extra

    sources = [name for name in graph.nodes if not graph.before[name]]
    first = frozenset(sources[:1])
    states, links, queue = {first: augmented(first)}, {first: set()}, [first]
    for antichain in queue:
        crossing = states[antichain]
        for name in sorted(crossing):
            for out in graph.after[name]:
                if out in antichain or any(bit[other] & below[out] for other in crossing):
                    continue
                moved = (crossing - {name}) | {out}
                following = frozenset(one for one in moved if not any(bit[other] & below[one] for other in moved))
                links.setdefault(following, set()).add(antichain)
                if following not in states:
                    states[following] = augmented(following)
                    queue.append(following)
    up_to = {antichain: _union(above[name] | bit[name] for name in crossing) for antichain, crossing in states.items()}
    ordered = sorted(states, key=lambda antichain: (bin(up_to[antichain]).count("1"), sorted(antichain)))
    number, ancestors = {antichain: n for n, antichain in enumerate(ordered)}, []
    for antichain in ordered:
        found = set()
        for before in links[antichain]:
            found |= {number[before]} | ancestors[number[before]]
        ancestors.append(found)
    nodes = [_members(up_to[antichain], names) for antichain in ordered]
    whole = [tuple(sum(getattr(graph.nodes[name], key) for name in members) for key in ("forward", "activation", "parameters"))
             for members in nodes]
    backward = [sum(graph.nodes[name].backward for name in members) for members in nodes]
    return Cuts([(time + back, activation, parameters) for (time, activation, parameters), back in zip(whole, backward)],
                [sum(graph.nodes[name].activation for name in states[antichain]) for antichain in ordered], ancestors, nodes)


def _union(sets):
    found = 0
    for one in sets:
        found |= one
    return found


def _members(bits, names):
    found = []
    while bits:
        low = bits & -bits
        found.append(names[low])
        bits ^= low
    return found
