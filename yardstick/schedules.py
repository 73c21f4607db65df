"""Every pipeline schedule as data: for each rank the operations it runs, in order.

    schedule = build("1f1b", stages=4, micro_batches=8)
    schedule[0][:3]                    # rank 0 begins with [Op("F", 0, 0), Op("F", 1, 0), Op("F", 2, 0)]

An operation is Op(kind, micro_batch, chunk). Kinds: "F" forward; "I" the backward's part that gives the gradient of the stage's
input; "W" the part that gives the gradients of its weights; "B" = I and W in one. The zero-bubble papers call I "B", DeepSeek's
call I and W together "B"; here "B" is always the whole backward. chunk: which of the rank's model parts, 0 to chunks - 1;
`stage_of[rank][chunk]` is its place in the model. A schedule says nothing about time: pipedream/simulator.py does.
More than 300 lines, because a schedule has one place.
"""

import heapq
from collections import deque
from typing import NamedTuple


class Op(NamedTuple):
    kind: str
    micro_batch: int
    chunk: int = 0


class Schedule(list):
    """A list over ranks of lists of Op.

    name; stages: pipeline stages as given to build; chunks: model parts of a rank; stage_of[rank][chunk]: the part's place in the
    model, from 0; micro_batches; flushes: all gradients of the micro-batches are there before an update; replicas: ranks of each
    stage; per_update: micro-batches whose gradients make one update; pairs[rank]: places n whose operation, a forward, is meant
    to overlap with the next one, a backward of another micro-batch (DualPipe's F & B).
    """

    def __init__(self, ranks, *, name, stages, micro_batches, stage_of, flushes=True, replicas=None, per_update=None, pairs=None):
        super().__init__(ranks)
        self.name, self.stages, self.micro_batches, self.flushes = name, stages, micro_batches, flushes
        self.stage_of, self.chunks, self.replicas = stage_of, len(stage_of[0]), replicas or [1] * stages
        self.per_update = per_update or micro_batches
        self.pairs = pairs or [()] * len(self)

    @property
    def model_parts(self):
        """Parts the model is cut into: one more than the highest of stage_of."""
        return 1 + max(part for parts in self.stage_of for part in parts)


def build(name, stages, micro_batches, chunks=None, replicas=None):
    """The schedule of a name in NAMES. Raises ValueError, with what is allowed, for what the schedule cannot do.

    stages: ranks of the pipeline; with replicas, a list of ranks per stage ("1f1b" and "pipedream" only; micro-batch k goes to rank k
    mod n of a stage of n), stages of the model. chunks: model parts of one rank; without it the fewest that the schedule takes.
    """
    if name not in NAMES:
        raise ValueError(f"no schedule is called {name!r}. Schedules: {', '.join(NAMES)}.")
    for word, value in (("stages", stages), ("micro_batches", micro_batches), ("chunks", 1 if chunks is None else chunks)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{word}={value} of {name} must be a whole number from 1.")
    make, shape, fewest = NAMES[name]
    chunks = fewest if chunks is None else chunks
    allowed = {"one": [1], "two": [2], "both": [1, 2], "even": range(2, 1000, 2), "any": range(1, 1000)}[shape]
    if chunks not in allowed:
        legal = {"even": "2, 4, 6, ...", "any": "1, 2, 3, ..."}.get(shape, " or ".join(map(str, allowed)))
        raise ValueError(f"{name} takes chunks={legal}, not {chunks}.")
    if replicas is not None:
        if name not in ("1f1b", "pipedream"):
            raise ValueError(f"{name} takes no replicas; 1f1b and pipedream do.")
        if len(replicas) != stages or not all(isinstance(n, int) and n > 0 for n in replicas):
            raise ValueError(f"replicas={replicas} must be {stages} whole numbers from 1, one for each stage.")
    return make(name, stages, micro_batches, chunks, *([replicas] if replicas is not None else []))


# One model part per rank

def _gpipe(name, p, m, _):
    """GPipe (arXiv 1811.06965): all forwards, then all backwards."""
    ranks = [[Op("F", k) for k in range(m)] + [Op("B", k) for k in range(m)] for _ in range(p)]
    return Schedule(ranks, name=name, stages=p, micro_batches=m, stage_of=_straight(p))


def _one_f_one_b(name, p, m, _, replicas=None):
    """1F1B: PipeDream's order (SOSP'19, section 3.2) with its round-robin over replicas; with a flush DAPPLE and PipeDream-Flush.

    Stage s with r_s of the ranks begins with floor((r_s + ... + r_{p-1} - 1) / r_s) forwards, p-1-s where no stage is replicated:
    then a backward is ready whenever a forward ends.
    """
    replicas = list(replicas or [1] * p)
    ranks, stage_of = [], []
    for stage, here in enumerate(replicas):
        for first in range(here):
            mine = range(first, m, here)
            warm = min((sum(replicas[stage:]) - 1) // here, len(mine))
            order = [Op("F", k) for k in mine[:warm]]
            for ahead, k in zip(mine[warm:], mine):
                order += [Op("F", ahead), Op("B", k)]
            ranks.append(order + [Op("B", k) for k in mine[len(mine) - warm:]])
            stage_of.append([stage])
    flushes = name == "1f1b"
    per_update = {"pipedream": 1, "pipedream_2bw": p}.get(name)      # 2BW: as many as keep all stages busy, the paper's least
    return Schedule(ranks, name=name, stages=p, micro_batches=m, stage_of=stage_of, flushes=flushes, replicas=replicas,
                    per_update=per_update)


# Several parts per rank, in the order of ranks

def _looped(name, p, m, v):
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2) and its zero-bubble form; v = 1 of the latter is ZB-H1, ZB-H2 with two hops.

    Micro-batches go through a rank's parts in groups of g = m / rounds, with rounds = max(1, m // p): torch's rule, which for a
    multiple of p is Megatron's g = p. A rank begins with (v-1) g forwards and `hops` more for each rank behind it. The split
    backward keeps the first hops * rank weight gradients back, so that every rank holds as many micro-batches as the first.
    """
    split = name != "interleaved_1f1b"
    hops = 2 if name in ("interleaved_1f1b", "zb_h2") else 1
    rounds = max(1, m // p)
    group = m // rounds
    if m % rounds:
        raise ValueError(f"{name} on {p} stages makes {rounds} rounds of micro_batches={m}, which must be a multiple of {rounds}: use "
                         f"{rounds * group} or {rounds * (group + 1)}.")

    def place(k, back):                                   # the k-th forward or backward of a rank: its micro-batch, its part
        chunk = k // group % v
        return k // (group * v) * group + k % group, v - 1 - chunk if back else chunk
    ranks = []
    for rank in range(p):
        order, done, late, total = [], 0, hops * rank if split else 0, m * v
        warm = min((v - 1) * group + hops * (p - 1 - rank), total)
        for step in range(total + warm):
            if step < total:
                order.append(Op("F", *place(step, False)))
            if step >= warm:
                order.append(Op("I" if split else "B", *place(step - warm, True)))
                if split and step - warm >= late:
                    order.append(Op("W", *place(done, True)))
                    done += 1
        ranks.append(order + [Op("W", *place(k, True)) for k in range(done, total if split else 0)])
    stage_of = [[chunk * p + rank for chunk in range(v)] for rank in range(p)]
    return Schedule(ranks, name=name, stages=p, micro_batches=m, stage_of=stage_of)


# Two parts per rank: a V through the ranks, or the same model from both ends

class _Tape(list):
    """A rank's operations as they are written down; each kind takes the micro-batches of a part in their order."""

    def __init__(self):
        self.next, self.waiting, self.pairs = {}, deque(), []

    def add(self, kind, part):
        """kind "F", "B", "I", "W"; an I leaves its W waiting."""
        key = (part, "F" if kind == "F" else "W" if kind == "W" else "B")
        k = self.next[key] = self.next.get(key, -1) + 1
        self.append(Op(kind, k, part))
        if kind == "I":
            self.waiting.append((part, k))

    def overlap(self, forward, back):
        """F of one part and B of the other, meant to run at the same time."""
        self.pairs.append(len(self))
        self.add("F", forward), self.add("B", back)

    def weights(self):
        """The oldest W that waits, where one does."""
        if self.waiting:
            part, k = self.waiting.popleft()
            self.append(Op("W", k, part))


def _zb_v(name, p, m, _):
    """ZB-V (arXiv 2401.10241, section 6), in the order of torch's ScheduleZBVZeroBubble.

    Fewer than 2p-1 micro-batches are the schedule of 2p-1 without those that are not there.
    """
    ranks, n = [], max(2 * p - 1, m)
    for rank in range(p):
        tape, back = _Tape(), p - 1 - rank
        for _ in range(2 * back + 1):
            tape.add("F", 0)
        for _ in range(rank):
            tape.add("F", 1), tape.add("F", 0)
        for _ in range(back + 1):
            tape.add("F", 1), tape.add("I", 1), tape.weights()
        begun, ended = 2 * back + 1 + rank, p             # forwards of part 0 and of part 1
        while ended < begun or begun < n:
            if begun < n:
                tape.add("F", 0)
                begun += 1
            tape.add("I", 0), tape.weights()
            tape.add("F", 1), tape.add("I", 1), tape.weights()
            ended += 1
        for _ in range(rank):
            tape.add("I", 0), tape.add("I", 1)
        late = [op for op in tape.waiting]
        firsts, seconds = deque(k for part, k in late if part == 0), [k for part, k in late if part == 1]
        for _ in range(back + 1):
            tape.add("I", 0)
            firsts.append(tape[-1].micro_batch)
            tape.append(Op("W", firsts.popleft(), 0))
        tape += [Op("W", k, 1) for k in seconds] + [Op("W", k, 0) for k in firsts]
        ranks.append([op for op in tape if op.micro_batch < m])
    return Schedule(ranks, name=name, stages=p, micro_batches=m, stage_of=_v_shape(p))


def _dual(p, rank, m):
    """Eight phases of DualPipe (arXiv 2412.19437, figure 5; order of github.com/deepseek-ai/DualPipe) for one rank of a V of p ranks."""
    tape, back = _Tape(), p - 1 - rank
    for _ in range(2 * back):
        tape.add("F", 0)
    for _ in range(rank + 1):
        tape.add("F", 0), tape.add("F", 1)
    for _ in range(back):
        tape.add("I", 1), tape.weights(), tape.add("F", 1)
    for turn in range(m - 2 * p + rank + 1):
        if turn or back:
            tape.overlap(0, 1)
        else:                                             # at the foot of the V what the F gives is sent before the B begins
            tape.add("F", 0), tape.add("B", 1)
        tape.overlap(1, 0)
    for _ in range(back):
        tape.add("B", 1), tape.overlap(1, 0)
    for turn in range(2 * (rank + 1)):                    # its second half splits the backward
        tape.add("I" if turn > rank else "B", 1 - turn % 2)
    for _ in range(back):
        tape.weights(), tape.add("I", 0)
    while tape.waiting:
        tape.weights()
    return tape


def _dualpipe_v(name, p, m, _):
    if m < 2 * p:
        raise ValueError(f"dualpipe_v on {p} stages takes micro_batches from {2 * p}, not {m}.")
    ranks = [_dual(p, rank, m) for rank in range(p)]
    return Schedule(ranks, name=name, stages=p, micro_batches=m, stage_of=_v_shape(p), pairs=[tape.pairs for tape in ranks])


def _dualpipe(name, p, m, _):
    """A rank holds stage r for the micro-batches that come from the first rank, and stage p-1-r for those from the last."""
    if p % 2 or m % 2 or m < 2 * p:
        raise ValueError(f"dualpipe takes an even number of stages and an even number of micro_batches, twice the stages or more; not "
                         f"stages={p}, micro_batches={m}." + (f" Use stages={p + p % 2}, micro_batches={max(m + m % 2, 2 * (p + p % 2))}."))
    ranks, pairs = [], []
    for rank in range(p):
        upper = rank >= p // 2                            # of the second half the other direction comes first
        tape = _dual(p // 2, min(rank, p - 1 - rank), m // 2)
        ranks.append([Op(kind, k + (part ^ upper) * m // 2, part ^ upper) for kind, k, part in tape])
        pairs.append(tape.pairs)
    return Schedule(ranks, name=name, stages=p, micro_batches=m, stage_of=_both_ways(p), pairs=pairs)


def _chimera(name, p, m, _):
    """Chimera (arXiv 2107.06925, section 3): units of p micro-batches, half from either end, one after another.

    Each direction is 1F1B of one micro-batch in two slots of time, F = B = one slot: forwards of one direction and of the other then
    fall on slots of different parity, backwards too, so that the two never meet.
    """
    if p % 2 or m % p:
        raise ValueError(f"chimera takes an even number of stages and micro_batches that are a multiple of them; not stages={p}, "
                         f"micro_batches={m}. Use stages={p + p % 2}, micro_batches={max(1, -(-m // (p + p % 2))) * (p + p % 2)}.")
    ranks = []
    for rank in range(p):
        slots = []
        for k in range(m):
            unit, place = divmod(k, p)
            up, place = divmod(place, p // 2)
            stage = p - 1 - rank if up else rank
            begin = 2 * p * unit + 2 * place
            slots += [(begin + stage, Op("F", k, up)), (begin + 2 * p - 1 - stage, Op("B", k, up))]
        ranks.append([op for _, op in sorted(slots)])
    return Schedule(ranks, name=name, stages=p, micro_batches=m, stage_of=_both_ways(p))


def _hanayo(name, p, m, v):
    """Hanayo (arXiv 2308.15762, section 3): the model's parts zigzag through the ranks, v / 2 times down and up.

    The order is that of ranks which take, whenever they are free, a backward before a forward, of forwards the deepest, of
    equals the earliest micro-batch, with B = F and at most 2p-1 micro-batches on their way.
    """
    stage_of = [[part * p + (p - 1 - rank if part % 2 else rank) for part in range(v)] for rank in range(p)]
    return Schedule(_greedy(stage_of, m, 2 * p - 1), name=name, stages=p, micro_batches=m, stage_of=stage_of)


def _greedy(stage_of, m, limit):
    where = {part: (rank, chunk) for rank, parts in enumerate(stage_of) for chunk, part in enumerate(parts)}
    last, ranks = len(where) - 1, [[] for _ in stage_of]
    ready, busy, events, begun = [[] for _ in stage_of], [False] * len(stage_of), [], min(limit, m)

    def offer(kind, part, k):
        rank, chunk = where[part]
        heapq.heappush(ready[rank], (kind == "F", -part if kind == "F" else 0, k, chunk, part, kind))
    for k in range(begun):
        offer("F", 0, k)
    now, count = 0, 0
    while True:
        for rank, waiting in enumerate(ready):
            if waiting and not busy[rank]:
                _, _, k, chunk, part, kind = heapq.heappop(waiting)
                ranks[rank].append(Op(kind, k, chunk))
                busy[rank], count = True, count + 1
                heapq.heappush(events, (now + 1, count, rank, kind, part, k))
        if not events:
            return ranks
        now = events[0][0]
        while events and events[0][0] == now:
            _, _, rank, kind, part, k = heapq.heappop(events)
            busy[rank] = False
            if kind == "F":
                offer(*(("F", part + 1, k) if part < last else ("B", part, k)))
            elif part:
                offer("B", part - 1, k)
            elif begun < m:
                offer("F", 0, begun)
                begun += 1


def _straight(p):
    return [[rank] for rank in range(p)]


def _v_shape(p):
    return [[rank, 2 * p - 1 - rank] for rank in range(p)]


def _both_ways(p):
    return [[rank, p - 1 - rank] for rank in range(p)]


# name: (how it is made, which chunks it takes, the fewest)
NAMES = {"gpipe": (_gpipe, "one", 1), "1f1b": (_one_f_one_b, "one", 1), "interleaved_1f1b": (_looped, "any", 1),
         "pipedream": (_one_f_one_b, "one", 1), "pipedream_2bw": (_one_f_one_b, "one", 1), "zb_h1": (_looped, "one", 1),
         "zb_h2": (_looped, "one", 1), "interleaved_zero_bubble": (_looped, "any", 1), "zb_v": (_zb_v, "two", 2),
         "dualpipe": (_dualpipe, "both", 2), "dualpipe_v": (_dualpipe_v, "two", 2), "chimera": (_chimera, "both", 2),
         "hanayo": (_hanayo, "even", 2)}
