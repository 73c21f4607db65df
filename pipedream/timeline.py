"""A pipeline's timeline: start and end of every operation, and what follows from them: bubbles, memory, versions, critical path.

`rows` is the form in which timelines, simulated or measured, are recorded and drawn.
"""

from typing import NamedTuple

from pipedream.versions import held_versions, versions
from yardstick import schedules


class Event(NamedTuple):
    """One operation of one rank: start and end in the unit of the times, version of the weights it uses."""

    rank: int
    op: schedules.Op
    start: float
    end: float
    version: int


class Timeline:
    """What `simulate` found. starts[rank][n], ends[rank][n]: of the n-th operation of the schedule's rank.

    makespan: from 0 to the last end; per rank busy: seconds of work, and span: from its first start to its last end. paired: the
    schedule's pairs ran as one operation, so that both have the same start and end.
    """

    def __init__(self, schedule, starts, ends, cause, paired=False):
        self.schedule, self.starts, self.ends, self._cause, self.paired = schedule, starts, ends, cause, paired
        self.makespan = max((rank[-1] for rank in ends if rank), default=0.0)
        self.busy = [sum(end - start for start, end in zip(*both)) for both in zip(starts, ends)]
        if paired:
            self.busy = [busy - sum(ends[rank][place] - starts[rank][place] for place in schedule.pairs[rank]) for rank, busy in enumerate(self.busy)]
        self.span = [end[-1] - start[0] if end else 0.0 for start, end in zip(starts, ends)]
        mean = sum(self.busy) / len(self.busy)
        self.bubble_of_makespan = 1 - mean / self.makespan           # idle share of the step
        self.bubble_of_span = 1 - mean / max(self.span)              # the zero-bubble papers' rate: a rank's own first to last
        self.bubble_of_ideal = self.makespan / mean - 1              # idle time over work, as Megatron counts

    @property
    def peak_in_flight(self):
        """Per rank, the most chunk activations at once: held from the start of an F to the end of its B or W."""
        return [max((count for count, _ in self._held(rank)), default=0) for rank in range(len(self.starts))]

    @property
    def weight_versions(self):
        """Per rank, the most versions of the weights it must keep: those of forwards that wait for their backward, and the newest."""
        return held_versions(self.schedule)

    @property
    def events(self):
        """[Event] of all ranks, by start."""
        used = versions(self.schedule)
        found = [Event(rank, op, *rest) for rank, ops in enumerate(self.schedule)
                 for op, *rest in zip(ops, self.starts[rank], self.ends[rank], used[rank])]
        return sorted(found, key=lambda event: (event.start, event.rank))

    @property
    def rows(self):
        """Per rank [[kind, micro-batch, chunk, start, end, version], ...]: the form of records and of figures.

        pipedream_simple.py and benchmark.py record what they measure in it, in seconds from the first start.
        """
        return [[[*op, *rest] for op, *rest in zip(ops, self.starts[rank], self.ends[rank], used)]
                for rank, (ops, used) in enumerate(zip(self.schedule, versions(self.schedule)))]

    def memory(self, rank):
        """[(time, chunk activations held from then on)] of one rank."""
        return [(when, count) for count, when in self._held(rank)]

    def _held(self, rank):
        count, found = 0, []
        for op, start, end in zip(self.schedule[rank], self.starts[rank], self.ends[rank]):
            if op.kind in "FBW":
                count += 1 if op.kind == "F" else -1
                found.append((count, start if op.kind == "F" else end))
        return found

    @property
    def critical_path(self):
        """[Event] without a gap but sends, from the first operation to the last one to end: a longer one makes the step longer."""
        used = versions(self.schedule)
        rank = max(range(len(self.ends)), key=lambda r: self.ends[r][-1] if self.ends[r] else 0.0)
        place, path = len(self.ends[rank]) - 1, []
        while place >= 0:
            path.append(Event(rank, self.schedule[rank][place], self.starts[rank][place], self.ends[rank][place], used[rank][place]))
            before = self._cause[rank][place]
            rank, place = before if before else (rank, place - 1)
        return path[::-1]

    def text(self, width=110):
        """The timeline as lines of text, a rank each: a digit is the micro-batch modulo 10 of a forward, a letter that of a backward
        (a is 0), w a weight gradient, a dot an idle time. Of a pair that ran as one, each takes half."""
        lines = []
        for rank, ops in enumerate(self.schedule):
            row, firsts = ["."] * width, self.schedule.pairs[rank] if self.paired else ()
            for place, (op, start, end) in enumerate(zip(ops, self.starts[rank], self.ends[rank])):
                if place in firsts:
                    end = (start + end) / 2
                elif place - 1 in firsts:
                    start = (start + end) / 2
                sign = {"F": "0123456789", "W": "w" * 10}.get(op.kind, "abcdefghij")[op.micro_batch % 10]
                for column in range(round(start / self.makespan * width), max(round(start / self.makespan * width) + 1,
                                                                              round(end / self.makespan * width))):
                    row[min(column, width - 1)] = sign
            lines.append(f"rank {rank:<3} {''.join(row)}")
        return "\n".join(lines)

    def trace(self):
        """The timeline as Chrome's trace events, in microseconds: json.dump it, open it in Perfetto or chrome://tracing."""
        return {"traceEvents": [{"ph": "X", "pid": 0, "tid": event.rank, "name": f"{event.op.kind}{event.op.micro_batch}", "cat": event.op.kind,
                                 "ts": event.start * 1e6, "dur": (event.end - event.start) * 1e6,
                                 "args": {"micro_batch": event.op.micro_batch, "chunk": event.op.chunk, "version": event.version}}
                                for event in self.events]
                + [{"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}}
                   for rank in range(len(self.schedule))]}
