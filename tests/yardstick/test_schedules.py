"""The schedules are those that torch and DeepSpeed run and that the papers count; what they cannot do is refused."""

from collections import Counter

import pytest

from yardstick.schedules import NAMES, Op, build

GRID = [(p, m) for p in (2, 3, 4, 5, 8) for m in (p, 2 * p, 3 * p, 4 * p)]
FEWEST = {"two": 2, "both": 2, "even": 2}


def torch_table(name, p, m, v=None):
    """[[Op]] by torch's own table; an overlapped pair is its two operations."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
    kinds = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}
    ranks = []
    for row in get_schedule_ops(name, p, m, v):
        ops = [part for action in row if action is not None for part in (action.sub_actions or (action,))]
        ranks.append([(kinds[op.computation_type.name], op.stage_index, op.microbatch_index) for op in ops
                      if op.computation_type.name in kinds])
    return ranks


def ours(name, p, m, v=None):
    schedule = build(name, p, m, v)
    return [[(op.kind, schedule.stage_of[rank][op.chunk], op.micro_batch) for op in ops] for rank, ops in enumerate(schedule)]


@pytest.mark.parametrize("p, m", GRID)
def test_torch_runs_the_same(p, m):
    assert ours("gpipe", p, m) == torch_table("GPipe", p, m)
    table = torch_table("1F1B", p, m)
    table[-1] = [(kind, stage, k - 1 if kind == "F" else k) for kind, stage, k in table[-1]]       # torch counts these from 1
    assert ours("1f1b", p, m) == table
    for v in (2, 3):
        assert ours("interleaved_1f1b", p, m, v) == torch_table("Interleaved1F1B", p, m, v)
        assert ours("interleaved_zero_bubble", p, m, v) == torch_table("InterleavedZeroBubble", p, m, v)
    assert ours("zb_v", p, m) == torch_table("ZBVZeroBubble", p, m)
    if m >= 2 * p:
        assert ours("dualpipe_v", p, m) == torch_table("DualPipeV", p, m)


@pytest.mark.parametrize("p, m", [(p, m) for p, m in GRID if m >= 2 * p])
def test_torch_overlaps_the_same_pairs(p, m):
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
    theirs = [[tuple((sub.stage_index, sub.microbatch_index) for sub in action.sub_actions) for action in row if action and action.sub_actions]
              for row in get_schedule_ops("DualPipeV", p, m)]
    schedule = build("dualpipe_v", p, m)
    mine = [[tuple((schedule.stage_of[rank][op.chunk], op.micro_batch) for op in ops[place:place + 2]) for place in places]
            for rank, (ops, places) in enumerate(zip(schedule, schedule.pairs))]
    assert mine == theirs


@pytest.mark.parametrize("p, m, v", [(4, 10, 2), (4, 3, 2), (8, 20, 3), (2, 7, 2), (4, 6, 3)])
def test_torch_rules_for_odd_counts_of_micro_batches(p, m, v):
    try:
        table = torch_table("Interleaved1F1B", p, m, v)
    except ValueError:
        with pytest.raises(ValueError, match="rounds"):
            build("interleaved_1f1b", p, m, v)
    else:
        assert ours("interleaved_1f1b", p, m, v) == table
        assert ours("interleaved_zero_bubble", p, m, v) == torch_table("InterleavedZeroBubble", p, m, v)


@pytest.mark.parametrize("p, m", [(p, m) for p in range(1, 9) for m in (1, 2, 5, 8, 12)])
def test_deepspeed_trains_in_the_same_order(p, m):
    from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule
    for rank, ops in enumerate(build("1f1b", p, m)):
        order, seen = [], Counter()
        for step in TrainSchedule(m, p, rank):
            for command in step:
                if isinstance(command, (ForwardPass, BackwardPass)):
                    kind = "F" if isinstance(command, ForwardPass) else "B"
                    order.append(Op(kind, seen[kind]))
                    seen[kind] += 1
        assert order == ops


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p, m", [(2, 4), (4, 8), (4, 16), (8, 16)])
def test_every_operation_once(name, p, m):
    schedule = build(name, p, m)
    for rank, ops in enumerate(schedule):
        assert len(set(ops)) == len(ops)
        for chunk in range(schedule.chunks):
            kinds = {kind: [op.micro_batch for op in ops if op.chunk == chunk and op.kind == kind] for kind in "FIWB"}
            assert sorted(kinds["B"] + kinds["I"]) == sorted(kinds["B"] + kinds["W"]) == sorted(kinds["F"])
            whole = 2 if name in ("dualpipe", "chimera") else 1                  # half of the micro-batches from either end
            assert len(kinds["F"]) == m // whole
    assert schedule.flushes == (not name.startswith("pipedream"))


@pytest.mark.parametrize("replicas, counts", [([1, 1, 1, 1], [4, 3, 2, 1]), ([2, 1, 1], [2, 2, 2, 1]), ([3, 1], [2, 2, 2, 1]),
                                              ([9, 5, 1, 1], [2] * 9 + [2] * 5 + [2, 1])])
def test_round_robin_over_replicas(replicas, counts):
    """SOSP'19, section 3.2: forwards on their way at most, which is how many versions of the weights a rank holds."""
    schedule = build("pipedream", len(replicas), 64, replicas=replicas)
    assert len(schedule) == sum(replicas) and [stage for [stage] in schedule.stage_of] == [
        stage for stage, n in enumerate(replicas) for _ in range(n)]
    for rank, (ops, most) in enumerate(zip(schedule, counts)):
        on_their_way, peak = 0, 0
        for op in ops:
            on_their_way += 1 if op.kind == "F" else -1
            peak = max(peak, on_their_way)
        assert peak == most
        [stage], here = schedule.stage_of[rank], replicas[schedule.stage_of[rank][0]]
        assert {op.micro_batch % here for op in ops} == {(rank - sum(replicas[:stage])) % here}


@pytest.mark.parametrize("arguments, says", [
    (("zb_h3", 4, 8), "no schedule is called 'zb_h3'. Schedules: gpipe, 1f1b"), (("1f1b", 0, 8), "stages=0"), (("1f1b", 4, 0), "micro_batches=0"),
    (("1f1b", 4, 8, 2), "takes chunks=1, not 2"), (("zb_v", 4, 8, 1), "takes chunks=2"), (("hanayo", 4, 8, 3), "2, 4, 6"),
    (("dualpipe", 3, 8), "Use stages=4, micro_batches=8"), (("dualpipe_v", 4, 7), "from 8"), (("chimera", 4, 6), "Use stages=4, micro_batches=8"),
    (("interleaved_1f1b", 4, 9, 2), "use 8 or 10"), (("gpipe", 2, 4, 1, [1, 1]), "takes no replicas"), (("1f1b", 2, 4, 1, [1]), "must be 2 whole"),
    (("1f1b", 2, 4, 1, [0, 1]), "must be 2 whole"), (("1f1b", 2.0, 4), "whole number"),
])
def test_what_a_schedule_cannot_do_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(").replace("+", r"\+")):
        build(*arguments)
