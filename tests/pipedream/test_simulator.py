"""The simulator gives the papers' bubbles, agrees with the closed forms, and refuses schedules that cannot run."""

import json
import random
import subprocess
import sys

import pytest

from pipedream.simulator import held_versions, simulate, versions
from yardstick import formulas
from yardstick.results import ROOT
from yardstick.schedules import NAMES, Op, build

# arXiv 2401.10241: stages, micro-batches, the times of table 9 (F, B = our I, W, communication), and of table 5 the bubble rates
# of 1F1B, ZB-H1, ZB-H2
ZERO_BUBBLE = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585, 0.1083), (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242, 0.0837),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674, 0.0444), (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323, 0.0698),
    (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045, 0.0559), (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554, 0.0294),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397, 0.0672), (16, 64, 11.307, 11.254, 8.101, 0.379, 0.2082, 0.1088, 0.0516),
    (16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251, 0.0576, 0.0266), (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421, 0.0641),
    (32, 128, 10.408, 10.204, 7.703, 0.408, 0.2168, 0.1106, 0.0490), (32, 256, 10.402, 10.248, 7.698, 0.460, 0.1352, 0.0594, 0.0257)]


@pytest.mark.parametrize("row", ZERO_BUBBLE, ids=lambda row: f"{row[0]}x{row[1]}")
def test_table_5_of_the_zero_bubble_paper(row):
    stages, micro_batches, forward, inputs, weights, send, *rates = row
    for name, rate in zip(("1f1b", "zb_h1", "zb_h2"), rates):
        found = simulate(build(name, stages, micro_batches), forward, inputs, weights, send)
        assert round(found.bubble_of_span, 4) == rate, name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", (2, 4, 6, 8))
def test_closed_forms_are_what_a_replay_gives(name, stages):
    tried = 0
    for rounds in (1, 2, 3, 4):
        for chunks in (2, 4) if name in ("interleaved_1f1b", "interleaved_zero_bubble", "hanayo") else (None,):
            try:
                schedule = build(name, stages, stages * rounds, chunks)
            except ValueError:
                continue
            share = schedule.model_parts / stages                       # parts of the model per stage
            for F, I, W in ((1, 1, 1), (1, 1.2, 0.7), (1, 2, 0.5)):
                found = simulate(schedule, F / share, I / share, W / share)
                try:
                    closed = formulas.bubble_seconds(name, stages, stages * rounds, chunks or 1, F, I, W)
                except ValueError:
                    continue
                tried += 1
                work = max(found.busy)
                assert found.makespan - work == pytest.approx(closed[0]) and max(found.span) - work == pytest.approx(closed[1])
                assert formulas.bubble_fraction(name, stages, stages * rounds, chunks or 1, forward=F, input_grad=I, weight_grad=W) == (
                    pytest.approx(found.bubble_of_makespan))
                try:
                    peaks = [formulas.activations_in_flight(name, stages, stages * rounds, rank, chunks or 1) for rank in range(stages)]
                except ValueError:
                    continue
                assert found.peak_in_flight == peaks
    assert tried


def test_published_bubbles_of_chimera_and_hanayo():
    """Chimera: (D-2)/(2N+D-2) for B = F, (D-2)/(3N/2+D-2) for B = 2F and N = D (arXiv 2107.06925, table 2). Hanayo: 2P-2 in units of
    a wave's forward, T_F / W (arXiv 2308.15762, the numerator of its ratio)."""
    for stages in (4, 6, 8):
        for units in (1, 2, 4):
            n = units * stages
            assert simulate(build("chimera", stages, n), 1, 0.5, 0.5).bubble_of_makespan == pytest.approx((stages - 2) / (2 * n + stages - 2))
        assert simulate(build("chimera", stages, stages), 1, 1, 1).bubble_of_makespan == pytest.approx((stages - 2) / (1.5 * stages + stages - 2))
        for waves in (1, 2, 3):
            found = simulate(build("hanayo", stages, stages, 2 * waves), 1 / (2 * waves), 1 / (2 * waves), 1 / (2 * waves))
            assert (found.makespan - max(found.busy)) * waves == pytest.approx(2 * stages - 2)


@pytest.mark.parametrize("stages", (2, 3, 4))
def test_versions_and_staleness(stages):
    """SOSP'19 section 3.3 and pipedream_2bw's rule, for every operation."""
    count = 5 * stages
    schedule = build("pipedream", stages, count)
    stash, naive, sync = (versions(schedule, semantics) for semantics in ("stash", "naive", "vertical_sync"))
    for rank, ops in enumerate(schedule):
        behind = stages - 1 - rank
        for place, (kind, k, _) in enumerate(ops):
            assert stash[rank][place] == max(0, k - behind)
            assert sync[rank][place] == max(0, k - (stages - 1))
            assert naive[rank][place] == (max(0, k - behind) if kind == "F" else k)
            if kind == "B" and k >= stages:                    # an update onto version k by a gradient of an older one
                for semantics, used in (("stash", stash), ("vertical_sync", sync)):
                    assert k - used[rank][place] == formulas.staleness(semantics, stages, rank)
    assert held_versions(schedule) == [formulas.pipedream_versions([1] * stages, rank) for rank in range(stages)]
    assert simulate(schedule).weight_versions == held_versions(schedule)
    assert held_versions(schedule, "naive") == [1] * stages
    double = build("pipedream_2bw", stages, count)
    for ops, used in zip(double, versions(double)):
        assert all(version == max(0, op.micro_batch // stages - 1) for op, version in zip(ops, used))
    assert held_versions(double) == [2] * stages


@pytest.mark.parametrize("replicas", ([2, 1, 1], [3, 1], [4, 2, 1], [9, 5, 1, 1]))
def test_versions_of_replicated_stages(replicas):
    schedule = build("pipedream", len(replicas), 180, replicas=replicas)
    wanted = [formulas.pipedream_versions(replicas, stage) for stage, n in enumerate(replicas) for _ in range(n)]
    assert held_versions(schedule) == wanted


def test_times_per_stage_and_chunk_sends_and_blocking():
    even = simulate(build("1f1b", 4, 8), 2, 1, 1)
    assert simulate(build("1f1b", 4, 8), [2] * 4, [1] * 4, [[1]] * 4).makespan == even.makespan
    slow = simulate(build("1f1b", 4, 8), [2, 2, 3, 2], 1, 1)
    assert slow.busy[2] == even.busy[2] + 8 and slow.makespan > even.makespan
    v = simulate(build("zb_v", 2, 4), [[1, 2], [3, 4]], 1, 1)
    assert v.busy == [4 * (1 + 2) + 16, 4 * (3 + 4) + 16]
    sent = simulate(build("1f1b", 4, 8), 2, 1, 1, 0.5)
    assert sent.makespan > even.makespan and sent.busy == even.busy
    assert simulate(build("1f1b", 4, 8), 2, 1, 1, message_bytes=50, bytes_per_second=100).makespan == sent.makespan
    blocking = simulate(build("1f1b", 4, 8), 2, 1, 1, 0.5, overlap=False)
    assert blocking.makespan > sent.makespan                        # who sends stands still
    with pytest.raises(ValueError, match="forward has 3 entries; 1f1b has 4 stages"):
        simulate(build("1f1b", 4, 8), [1, 2, 3])


@pytest.mark.parametrize("name", NAMES)
def test_a_timeline_keeps_the_order_of_things(name):
    random.seed(1)
    schedule = build(name, 4, 8)
    durations = [[random.uniform(0.5, 2) for _ in ops] for ops in schedule]
    found = simulate(schedule, send=0.3, durations=durations)
    end = {}
    for event in found.events:
        part = schedule.stage_of[event.rank][event.op.chunk]
        end["F" if event.op.kind == "F" else "W" if event.op.kind == "W" else "B", part, event.op.micro_batch] = event.end, event.rank
    last = schedule.model_parts - 1
    for rank, ops in enumerate(schedule):
        assert all(a <= b for a, b in zip(found.ends[rank], found.starts[rank][1:]))
        for op, start in zip(ops, found.starts[rank]):
            part, k = schedule.stage_of[rank][op.chunk], op.micro_batch
            need = {"F": ("F", part - 1, k), "W": ("B", part, k)}.get(op.kind, ("B", part + 1, k) if part < last else ("F", part, k))
            if need in end:
                assert start >= end[need][0] + (0.3 if end[need][1] != rank else 0) - 1e-9
    path = found.critical_path
    assert path[0].start == 0 and path[-1].end == found.makespan
    assert all(b.start - a.end in (pytest.approx(0), pytest.approx(0.3)) for a, b in zip(path, path[1:]))
    for rank in range(4):
        held = found.memory(rank)
        assert max(count for _, count in held) == found.peak_in_flight[rank] and held[-1][1] == 0


@pytest.mark.parametrize("name, parts", [("dualpipe", lambda p: p), ("dualpipe_v", lambda p: 2 * p)])
@pytest.mark.parametrize("stages", (2, 4, 6, 8, 16))
def test_the_published_bubble_of_dualpipe(name, parts, stages):
    """(PP/2 - 1) (F&B + B - 3W) of its README is the idle time of the ranks in the middle, where I = F and W <= F, whatever an
    overlapped pair takes; where I > F it is that less min((PP/2 - 1) (I - F), F)."""
    for micro_batches in (2 * stages, 2 * stages + 2, 4 * stages):
        schedule, parts_ = build(name, stages, micro_batches), parts(stages)
        for forward, inputs, weights in ((1, 1, 1), (1, 1, 0.5), (2, 2, 0), (1, 1.2, 0.7), (1, 2, 0.5)):
            for pair in (0.8, 0.9, 1.0):
                found = simulate(schedule, forward, inputs, weights, pair=pair)
                whole = inputs + weights
                published = formulas.dualpipe_bubble_seconds(parts_, forward, whole, weights, pair * (forward + whole))
                less = min((parts_ / 2 - 1) * (inputs - forward), forward)
                middle = stages // 2 if name == "dualpipe" else stages - 1
                assert found.makespan - found.busy[middle] == pytest.approx(published - less)
                assert found.busy[middle] == pytest.approx(min(found.busy))          # it overlaps most


def test_a_pair_is_one_operation():
    schedule = build("dualpipe_v", 2, 4)
    found, serial = simulate(schedule, pair=0.75), simulate(schedule)
    place = schedule.pairs[0][0]
    assert [op.kind for op in schedule[0][place:place + 2]] == ["F", "B"]
    assert found.starts[0][place] == found.starts[0][place + 1] and found.ends[0][place] == found.ends[0][place + 1]
    assert found.ends[0][place] - found.starts[0][place] == 0.75 * 3
    assert found.busy == [busy - 0.25 * 3 * len(pairs) for busy, pairs in zip(serial.busy, schedule.pairs)]
    assert all(b.start == a.end for a, b in zip(found.critical_path, found.critical_path[1:]))
    measured = [[end - start for start, end in zip(*rank)] for rank in zip(serial.starts, serial.ends)]
    assert simulate(schedule, durations=measured, pair=1.0).makespan == simulate(schedule, pair=1.0).makespan
    assert simulate(build("1f1b", 4, 8), pair=0.5).makespan == simulate(build("1f1b", 4, 8)).makespan      # it has no pairs


def test_rows_are_the_events_of_each_rank():
    found = simulate(build("pipedream", 3, 6), 1, 1, 1, 0.5)
    rows = found.rows
    assert [[tuple(row[:3]) for row in rank] for rank in rows] == [[tuple(op) for op in rank] for rank in found.schedule]
    flat = sorted((row[3], rank, *row) for rank, ops in enumerate(rows) for row in ops)
    assert [(event.start, event.rank, *event.op, event.start, event.end, event.version) for event in found.events] == flat


def changed(**places):
    schedule = build("1f1b", 2, 2)
    for rank, ops in places.items():
        schedule[int(rank[-1])] = ops
    return schedule


@pytest.mark.parametrize("schedule, says", [
    (changed(rank0=[Op("F", 0), Op("B", 0), Op("F", 1), Op("B", 1)], rank1=[Op("F", 1), Op("F", 0), Op("B", 0), Op("B", 1)]),
     "on rank 0, B0 can never start, because the gradient of part 1 of micro-batch 0 waits on rank 1, before F1"),
    (changed(rank1=[Op("B", 0), Op("F", 0), Op("F", 1), Op("B", 1)]), "on rank 1, B0"),
    (changed(rank1=[Op("W", 0), Op("F", 0), Op("I", 0), Op("F", 1), Op("B", 1)]), "on rank 1, W0"),
    (changed(rank1=[Op("F", 0), Op("B", 0), Op("F", 1)]), "micro-batch 1 has no whole backward through part 1"),
    (changed(rank1=[Op("F", 0), Op("B", 0), Op("F", 0), Op("B", 1)]), "F0 of part 1 is listed twice"),
    (changed(rank1=[Op("F", 0), Op("B", 0), Op("F", 7), Op("B", 1)]), "lists ('F', 7, 0)"),
])
def test_what_cannot_run_is_refused_with_the_operation(schedule, says):
    with pytest.raises(ValueError) as error:
        simulate(schedule)
    assert says in str(error.value), error.value


def test_the_program(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "pipedream/simulator.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    done = run("stages=4", "micro_batches=8")
    assert done.returncode == 0 and all(f"\n{name} " in done.stdout for name in NAMES)
    assert done.stdout.count("rank 3") == len(NAMES)
    done = run("schedules=zb_v", f"trace={tmp_path}/out/t.json")
    events = json.loads((tmp_path / "out" / "t.json").read_text())["traceEvents"]
    assert done.returncode == 0 and sum(event["ph"] == "X" for event in events) == 4 * 2 * 8 * 3
    for arguments, says in ((["schedules=zb"], "schedules are gpipe"), (["trace=t.json"], "takes one schedule"), (["stages=0"], "stages=0"),
                            (["stage=4"], "Did you mean stages?")):
        done = run(*arguments)
        text = done.stderr if done.returncode else done.stdout
        assert says in text and "Traceback" not in text
