"""Simulates a pipeline schedule: when each operation runs, what each rank holds, what the step waits for.

    python pipedream/simulator.py                                  # every schedule, as a table and as text timelines
    python pipedream/simulator.py schedules=1f1b,zb_h1 stages=8 micro_batches=16 forward=2 send=0.1
    python pipedream/simulator.py schedules=zb_v trace=runs/trace.json       # for ui.perfetto.dev

A rank runs its list in order; an operation starts when its rank is free and its input has arrived. Cost: one pass over the
operations, each looked at once or twice (pipedream/benchmark.py measures it).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipedream.timeline import Timeline
from pipedream.versions import SEMANTICS, held_versions, versions  # noqa: F401  a reader of the simulator looks for them here
from yardstick import schedules
from yardstick.settings import Either, SettingsError, override, usage

CONFIG = {
    "schedules": "all",                   # names of yardstick.schedules, joined by commas
    "stages": 4,                          # ranks of the pipeline
    "micro_batches": 8,                   # of one step
    "chunks": Either(int),                # model parts of a rank; None: CHUNKS, and else the fewest that the schedule takes
    "forward": 1.0,                       # seconds of a rank's whole forward of one micro-batch; a part takes its share
    "input_grad": 1.0,                    # seconds of its I
    "weight_grad": 1.0,                   # seconds of its W; a B takes both
    "send": 0.0,                          # seconds from the end of an operation to the start of one on another rank that needs it
    "pair": Either(float),                # DualPipe's pairs F & B as one operation of this share of F + B; None: one after the other
    "draw": True,                         # text timelines below the table
    "width": 110,                         # columns of a timeline
    "trace": Either(str),                 # file for Chrome's and Perfetto's trace viewer
}


CHUNKS = {"interleaved_1f1b": 2, "interleaved_zero_bubble": 2}       # with one part a rank they are 1F1B and ZB-H1


def simulate(schedule, forward=1.0, input_grad=1.0, weight_grad=1.0, send=0.0, *, message_bytes=0, bytes_per_second=None,
             overlap=True, durations=None, pair=None):
    """Run a schedule on paper -> Timeline. Linear in the operations.

    forward, input_grad, weight_grad: seconds of F, I and W of one chunk (B takes I + W): a number, a list per stage, or a list per
    stage of a list per chunk. A stage is a place in the pipeline: a rank, or where ranks are replicas or hold the model from both
    ends, what stage_of says. send: seconds that a message between two ranks is on its way, to which message_bytes /
    bytes_per_second is added; it occupies nobody, or with overlap=False its sender until it has arrived. durations:
    durations[rank][n] in place of the times, for measured ones. pair: a forward and a backward that the schedule means to overlap
    (Schedule.pairs) are one operation, which begins when both have what they need, takes this share of the sum of their times, and
    delivers both results at its end; None: they are two, one after the other.
    Raises ValueError for a schedule that cannot run to its end, naming an operation that can never start.
    """
    parts, count = schedule.model_parts, schedule.micro_batches
    flight = send + (message_bytes / bytes_per_second if bytes_per_second else 0.0)
    tables = [[_per_chunk(schedule, rank, times, word) for word, times in (
        ("forward", forward), ("input_grad", input_grad), ("weight_grad", weight_grad))] for rank in range(len(schedule))]
    # an operation's result has a number: forward of part s of micro-batch k, then its gradient
    end_of, rank_of, place_of = [None] * (2 * parts * count), [0] * (2 * parts * count), [0] * (2 * parts * count)
    starts, ends, cause = ([[] for _ in schedule] for _ in range(3))
    sent_until, waiting, todo = [0.0] * len(schedule), {}, list(range(len(schedule)))
    firsts = [set(places) if pair is not None else () for places in schedule.pairs]
    owner = _owners(schedule, parts)
    while todo:
        rank = todo.pop()
        ops, stages, begun, ended, why = schedule[rank], schedule.stage_of[rank], starts[rank], ends[rank], cause[rank]
        forwards, inputs, weights = tables[rank]
        now, mine, second = sent_until[rank], firsts[rank], False
        for place in range(len(ended), len(ops)):
            kind, k, chunk = ops[place]
            part = stages[chunk]
            gradient = (parts + part) * count + k
            if kind == "F":
                result, need = part * count + k, (part - 1) * count + k if part else None
                duration = forwards[chunk]
            elif kind == "W":
                result, need, duration = None, gradient, weights[chunk]
            else:
                result, need = gradient, gradient + count if part < parts - 1 else part * count + k
                duration = inputs[chunk] + (weights[chunk] if kind == "B" else 0.0)
            if durations is not None:
                duration = durations[rank][place]
            if second:                                            # of a pair: it began, and has ended, with the first
                start, end, before, second = begun[-1], ended[-1], why[-1] or (rank, place - 2), False
            else:
                start, before = now, None
                if need is not None:
                    arrived = end_of[need]
                    if arrived is None:
                        waiting.setdefault(need, []).append(rank)
                        break
                    if rank_of[need] != rank and overlap:
                        arrived += flight
                    if arrived > start:
                        start, before = arrived, (rank_of[need], place_of[need])
                if place in mine:
                    _, other, back = ops[place + 1]
                    need = (parts + stages[back] + 1) * count + other if stages[back] < parts - 1 else stages[back] * count + other
                    arrived = end_of[need]
                    if arrived is None:
                        waiting.setdefault(need, []).append(rank)
                        break
                    if rank_of[need] != rank and overlap:
                        arrived += flight
                    if arrived > start:
                        start, before = arrived, (rank_of[need], place_of[need])
                    duration = pair * (duration + (inputs[back] + weights[back] if durations is None else durations[rank][place + 1]))
                    second = True
                now = end = start + duration
            begun.append(start)
            ended.append(end)
            why.append(before)
            if result is not None:
                if not overlap:                                   # the sender stands still until it has arrived
                    target = part + 1 if kind == "F" else part - 1
                    if 0 <= target < parts and owner[target * count + k] != rank:
                        now += flight
                end_of[result], rank_of[result], place_of[result] = now, rank, place
                if result in waiting:
                    todo += waiting.pop(result)
        sent_until[rank] = now
    if stuck := {rank: schedule[rank][len(done)] for rank, done in enumerate(ends) if len(done) < len(schedule[rank])}:
        raise ValueError(_never(schedule, stuck, owner, parts))
    return Timeline(schedule, starts, ends, cause, pair is not None)


def _never(schedule, stuck, owner, parts):
    """Why a schedule stands still, in words. stuck: {rank: the operation it stands before}."""
    waits = {}
    for rank, op in stuck.items():
        part = schedule.stage_of[rank][op.chunk]
        if op.kind == "F":
            waits[rank] = part - 1, "forward"
        elif op.kind == "W":
            waits[rank] = part, "I"
        else:
            waits[rank] = (part + 1, "gradient") if part < parts - 1 else (part, "forward")
    by = {rank: owner[part * schedule.micro_batches + stuck[rank].micro_batch] for rank, (part, _) in waits.items()}
    rank = next((rank for rank in stuck if by[rank] == rank), None)        # it waits for itself: the cause, others wait for it
    if rank is None:
        rank, seen = next(iter(stuck)), []
        while rank not in seen:
            seen.append(rank)
            rank = by[rank]
    part, what = waits[rank]
    when = "comes later in its own list" if by[rank] == rank else f"waits on rank {by[rank]}, before {_name(stuck[by[rank]])}, for this rank"
    return (f"{schedule.name} cannot run to its end: on rank {rank}, {_name(stuck[rank])} can never start, because the {what} of part {part} of "
            f"micro-batch {stuck[rank].micro_batch} {when}.")


def _per_chunk(schedule, rank, times, word):
    """[seconds] for the chunks of one rank, out of a number, a list per stage, or a list per stage of a list per chunk."""
    if not isinstance(times, (list, tuple)):
        return [float(times)] * schedule.chunks
    if len(times) != schedule.stages:
        raise ValueError(f"{word} has {len(times)} entries; {schedule.name} has {schedule.stages} stages, one entry each.")
    by_part = schedule.model_parts == schedule.stages                # a stage is a part of the model: replicas, both directions
    row = [times[schedule.stage_of[rank][chunk] if by_part else rank] for chunk in range(schedule.chunks)]
    for entry in row:
        if isinstance(entry, (list, tuple)) and len(entry) != schedule.chunks:
            raise ValueError(f"{word} has {len(entry)} times for a stage; {schedule.name} has {schedule.chunks} chunks.")
    return [float(entry[chunk] if isinstance(entry, (list, tuple)) else entry) for chunk, entry in enumerate(row)]


def _owners(schedule, parts):
    """[rank that runs part s of micro-batch k], at s * micro_batches + k. Raises ValueError for an operation too many or too few."""
    count = schedule.micro_batches
    owner, backward = [None] * (parts * count), bytearray(parts * count)
    halves = {"B": 3, "I": 1, "W": 2}
    for rank, ops in enumerate(schedule):
        stages = schedule.stage_of[rank]
        for op in ops:
            kind, k, chunk = op
            if not 0 <= k < count or not 0 <= chunk < len(stages) or kind not in "FBIW":
                raise ValueError(f"{schedule.name}: rank {rank} lists {tuple(op)}, which is no operation of {count} micro-batches and {len(stages)} "
                                 "chunks.")
            place = stages[chunk] * count + k
            if kind == "F":
                twice, owner[place] = owner[place] is not None, rank
            else:
                twice = backward[place] & halves[kind]
                backward[place] |= halves[kind]
            if twice:
                raise ValueError(f"{schedule.name}: {_name(op)} of part {stages[chunk]} is listed twice, the second time on rank {rank}.")
    for place, (rank, done) in enumerate(zip(owner, backward)):
        if rank is None or done != 3:
            part, k = divmod(place, count)
            raise ValueError(f"{schedule.name}: micro-batch {k} has no {'forward' if rank is None else 'whole backward'} through part {part}.")
    return owner


def _name(op):
    return f"{op.kind}{op.micro_batch}" + (f" of chunk {op.chunk}" if op.chunk else "")


def compare(names, stages, micro_batches, chunks=None, pair=None, **times):
    """{name: Timeline or the reason, as text, why there is none}; the times are those of a rank's whole forward, I and W, and send."""
    found = {}
    for name in names:
        try:
            schedule = schedules.build(name, stages, micro_batches, chunks or CHUNKS.get(name))
        except ValueError as error:
            found[name] = str(error)
            continue
        share = schedule.model_parts / schedule.stages
        found[name] = simulate(schedule, *(times[word] / share for word in ("forward", "input_grad", "weight_grad")), times["send"], pair=pair)
    return found


def table(found):
    """Lines of text: what `compare` found, one schedule a line."""
    lines = [f"{'schedule':<24}{'makespan':>10}{'bubble of':>11}{'':>8}{'':>8}  activations held,  versions"]
    lines.append(f"{'':<24}{'':>10}{'makespan':>11}{'span':>8}{'ideal':>8}  first..last rank   of weights")
    for name, timeline in found.items():
        if isinstance(timeline, str):
            lines.append(f"{name:<24}  {timeline}")
            continue
        peaks, held = timeline.peak_in_flight, timeline.weight_versions
        lines.append(f"{name:<24}{timeline.makespan:>10.4g}{timeline.bubble_of_makespan:>11.2%}{timeline.bubble_of_span:>8.2%}"
                     f"{timeline.bubble_of_ideal:>8.2%}  {peaks[0]:>3} .. {peaks[-1]:<3} of 1/{timeline.schedule.chunks}   {held[0]} .. {held[-1]}")
    return "\n".join(lines)


def main():
    if text := usage(sys.argv[1:], __file__):
        print(text)
        return
    settings = override(CONFIG, sys.argv[1:], "pipedream/simulator.py")
    names = list(schedules.NAMES) if settings["schedules"] == "all" else settings["schedules"].split(",")
    if unknown := set(names) - set(schedules.NAMES):
        raise SettingsError(f"schedules={','.join(unknown)}: schedules are {', '.join(schedules.NAMES)}.")
    found = compare(names, settings["stages"], settings["micro_batches"], settings["chunks"],
                    **{word: settings[word] for word in ("forward", "input_grad", "weight_grad", "send", "pair")})
    print(table(found))
    drawn = {name: timeline for name, timeline in found.items() if not isinstance(timeline, str)}
    if settings["draw"]:
        for name, timeline in drawn.items():
            print(f"\n{name}\n{timeline.text(settings['width'])}")
    if settings["trace"]:
        if len(drawn) != 1:
            raise SettingsError(f"trace={settings['trace']} takes one schedule, and {len(drawn)} were simulated. Give schedules=1f1b, for example.")
        path = Path(settings["trace"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(*(timeline.trace() for timeline in drawn.values())))
        print(f"\nwritten: {path}; open it in ui.perfetto.dev")


if __name__ == "__main__":
    try:
        main()
    except (SettingsError, ValueError, OSError) as error:
        sys.exit(f"pipedream/simulator.py: {error}")
