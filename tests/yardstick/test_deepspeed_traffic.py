"""Traffic of the installed release: against a count made elsewhere, its own constant, and by hand."""

import pytest

from tests.yardstick.test_deepspeed_memory import HAND, config
from yardstick import deepspeed_traffic
from yardstick.deepspeed_memory import Tensors


@pytest.mark.parametrize("stage,accumulation,zero,payload", [
    (0, 1, {}, 13_228_036), (0, 2, {}, 13_228_036), (1, 1, {}, 26_456_068), (1, 2, {}, 26_456_068),
    (2, 1, {}, 26_456_068), (2, 2, {}, 39_684_100), (3, 1, {}, 26_456_072), (3, 2, {}, 52_873_224),
    (3, 1, {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}, 40_693_768)])
def test_payload_of_the_hand_made_ledger(stage, accumulation, zero, payload):
    rows = deepspeed_traffic.traffic(HAND, config(stage, **zero), ranks=2, accumulation=accumulation)
    assert sum(row.payload_bytes for row in rows) == payload
    assert all(row.why for row in rows)


def test_the_constant_is_that_of_the_installed_release(launch):
    assert launch(fallback, ranks=1).good() == [deepspeed_traffic.FALLBACK_BUCKET]


def fallback():
    def rank():
        import inspect

        from deepspeed.runtime.engine import DeepSpeedEngine
        parameters = inspect.signature(DeepSpeedEngine.buffered_allreduce_fallback).parameters
        return parameters["elements_per_buffer"].default
    return rank


def test_one_rank_sends_nothing():
    assert deepspeed_traffic.traffic(HAND, config(2), ranks=1) == []


@pytest.mark.parametrize("numels,size,sent", [
    ([4, 4, 4], 8, [8, 4]), ([4, 4, 4], 12, [12]), ([4, 9, 4], 8, [4, 9, 4]), ([9], 8, [9]), ([], 8, []),
    ([8, 8], 8, [8, 8])])
def test_buckets(numels, size, sent):
    assert deepspeed_traffic.buckets(numels, size) == sent


def test_calls_are_predicted_only_where_they_are_known():
    tensors = Tensors((100, 100, 100))
    calls = []
    for size in (200, 99):
        rows = deepspeed_traffic.traffic(tensors, config(2, reduce_bucket_size=size), ranks=2, accumulation=2)
        calls.append([row.calls for row in rows if row.phase == "backward"])
    assert calls == [[2 * 2], [None]]


@pytest.mark.parametrize("live,reuse,prefetch,keeps", [
    (None, None, None, "all"), (None, 800, 0, "all"), (None, 799, 0, "some"), (0, None, None, "all"),
    (None, 0, None, "some"), (None, 0, 0, "none"), (0, 0, None, "none"), (1, 0, None, "some")])
def test_what_stage_3_keeps(live, reuse, prefetch, keeps):
    """A weight's next use lies up to twice the model away, uses of tied weights included: here 2 * (300 + 100).

    What has been prefetched for a later use stays too, and max_live limits prefetching.
    """
    zero = {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": reuse,
            "stage3_prefetch_bucket_size": prefetch}
    given = {key: value for key, value in zero.items() if value is not None}
    assert deepspeed_traffic.stage3_keeps(Tensors((100, 200), (100,)), given) == keeps
