"""Bytes that the six strategies send in a step: counted where they are sent, equal to the formulas to the byte."""

from collections import Counter

import pytest

from tests.strategies import cases
from yardstick import deepspeed_memory, deepspeed_traffic, formulas

slow = pytest.mark.slow


def expected(count, first=False):
    """({(kind, phase): payload bytes}, {(kind, phase): calls, where they are predicted}) of one step."""
    payload, calls = Counter(), Counter()
    for row in deepspeed_traffic.traffic(count.tensors, count.config, ranks=count.ranks, first=first,
                                         accumulation=count.accumulation):
        payload[row.kind, row.phase] += row.payload_bytes
        calls[row.kind, row.phase] += float("nan") if row.calls is None else row.calls
    return dict(payload), {key: n for key, n in calls.items() if n == n}


def sent(count, column="payload_bytes"):
    """{(kind, phase): payload bytes, or calls} counted in one step, without the program's own mean of the loss."""
    return {(row["kind"], row["phase"]): row[column] for row in count.traffic if not row["what"]}


def check(counts, calls_of=()):
    """Payloads, and numbers of calls where they are predicted: at least those of `calls_of`."""
    for count in counts:
        payload, calls = expected(count)
        assert sent(count) == payload, f"rank {count.rank}"
        assert set(calls_of) <= set(calls)
        assert {key: n for key, n in sent(count, "calls").items() if key in calls} == calls, f"rank {count.rank}"


def in_P(count):
    """Ring traffic of a step over that of passing all weights around once."""
    weights = count.tensors.count * deepspeed_memory.element_bytes(count.config)
    ring = sum(formulas.ring_bytes(kind, size, count.ranks) for (kind, _), size in sent(count).items())
    return ring / formulas.ring_bytes("all_gather", weights, count.ranks)


@pytest.mark.parametrize("strategy,precision,accumulation",
                         cases.CASES + [pytest.param(*case, marks=slow) for case in cases.OTHERS])
def test_payload_is_predicted_to_the_byte(counted, strategy, precision, accumulation):
    check(counted(strategy, precision=precision, accumulation=accumulation))


@pytest.mark.parametrize("strategy", ["zero1", "zero2", pytest.param("zero3", marks=slow)])
def test_buckets_are_cut_where_predicted(counted, strategy):
    counts = counted(strategy, model="wide", precision="bf16", accumulation=2, reduce_bucket_size=2_200_000)
    gradients = "reduce_scatter" if strategy == "zero3" else "all_reduce", "backward"
    check(counts, [gradients])
    assert expected(counts[0])[1][gradients] > 2


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=slow), 2])
def test_the_first_step_of_stage_3(counted, accumulation):
    """It records the order of modules, and compares it between ranks by broadcasts that the report tells apart."""
    for count in counted("zero3", precision="fp32", accumulation=accumulation, steps=1):
        payload, _ = expected(count, first=True)
        assert {key: size for key, size in sent(count).items() if key[0] != "broadcast"} == payload
        assert payload != expected(count)[0]


@slow
@pytest.mark.parametrize("strategy,precision,accumulation", cases.CASES)
def test_four_ranks_of_the_default_model(counted, strategy, precision, accumulation):
    check(counted(strategy, ranks=4, model="tiny", precision=precision, accumulation=accumulation))


@slow
@pytest.mark.parametrize("strategy,precision,accumulation", cases.OTHERS)
def test_three_ranks_of_an_odd_model(counted, strategy, precision, accumulation):
    check(counted(strategy, ranks=3, model="odd", reduce_bucket_size=cases.BUCKET, precision=precision,
                  accumulation=accumulation))


@pytest.mark.parametrize("strategy,weights", [("dp", 2), ("zero1", 3), ("zero2", 5), ("offload", 5), ("zero3", 4)])
def test_how_many_times_the_weights_are_sent(counted, strategy, weights):
    """In P, with two micro-steps: 2; 2 and a gather; 2 for each and a gather; 2 for each."""
    count = counted(strategy, precision="fp32", accumulation=2)[0]
    assert in_P(count) == pytest.approx(weights, rel=0.02)         # persistent and padded tensors, norms


def test_stage_3_that_keeps_nothing_sends_what_the_paper_says(counted):
    counts = counted("zero3", precision="fp32", accumulation=1, max_reuse_distance=0, max_live=0)
    check(counts)
    count = counts[0]
    tied = sum(count.tensors.reused) / count.tensors.count         # the embedding gathers it, and the output layer
    assert in_P(count) == pytest.approx(formulas.zero_traffic_in_parameters(3) + 2 * tied, rel=0.02)
    assert deepspeed_traffic.stage3_keeps(count.tensors, count.config["zero_optimization"]) == "none"


@slow
def test_max_live_alone_changes_nothing(counted):
    check(counted("zero3", precision="fp32", accumulation=1, max_live=100_000))


@pytest.mark.parametrize("limits", [
    {"max_reuse_distance": 60_000, "max_live": 100_000}, pytest.param({"max_reuse_distance": 0}, marks=slow)],
    ids=["inside", "reuse 0"])
def test_limits_inside_the_models_size_stay_below_the_bound(counted, limits):
    """Which weights stay then depends on the order of modules; gathers lie between once and the bound."""
    for count in counted("zero3", precision="fp32", accumulation=1, **limits):
        assert deepspeed_traffic.stage3_keeps(count.tensors, count.config["zero_optimization"]) == "some"
        payload, _ = expected(count)
        real = sent(count)
        gathers = [("all_gather", "forward"), ("all_gather", "backward")]
        others = [{k: v for k, v in sums.items() if k not in gathers} for sums in (real, payload)]
        assert others[0] == others[1]
        once = payload["all_gather", "forward"] - 4 * sum(-(-n // 2) * 2 for n in count.tensors.reused)
        assert once <= real["all_gather", "forward"] <= payload["all_gather", "forward"]
        assert real.get(gathers[1], 0) <= payload[gathers[1]]          # 0: prefetching has kept them all
        assert sum(real.get(k, 0) for k in gathers) < sum(payload[k] for k in gathers), "no weight stayed"


@pytest.mark.parametrize("strategy", cases.ORDER[:4])
def test_a_meter_below_torch_distributed_counts_the_same(counted, strategy):
    for count in counted(strategy, precision="bf16", accumulation=2, dispatch=True):
        assert count.dispatched == sent(count)
        check([count])


def test_one_rank_sends_nothing(counted):
    count, = counted("zero2", ranks=1, precision="fp32", accumulation=1)
    assert deepspeed_traffic.traffic(count.tensors, count.config, ranks=1) == []
    assert sum(row["ring_bytes"] for row in count.traffic) == 0
