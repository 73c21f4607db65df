"""Formulas of the installed release: against counts made elsewhere, its own constants, and the paper."""

import pytest

from yardstick import deepspeed_memory, deepspeed_traffic, formulas
from yardstick.deepspeed_memory import Tensors
from yardstick.shapes import MIXED, MODELS, ModelShape

# The model and settings of a ledger that was made by hand before this project: 3,307,008 parameters, two ranks.
HAND = deepspeed_memory.of_shape(ModelShape(layers=4, hidden=256, heads=4, vocab=512, seq=64))


def config(stage, *, bf16=False, offload=None, **zero):
    given = {"gradient_clipping": 1.0, "optimizer": {"type": "AdamW", "params": {}}, "bf16": {"enabled": bf16},
             "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 1000,
                                   **zero}}
    if offload:
        given["zero_optimization"]["offload_optimizer"] = {"device": offload}
    return given


def per_parameter(moment, *arguments, **options):
    items = deepspeed_memory.memory(HAND, config(*arguments, **options), ranks=2)
    return round(sum(deepspeed_memory.by_kind(items, moment).values()) / HAND.count, 4)


@pytest.mark.parametrize("stage,options,bytes_each", [
    (0, {}, (12.0, 16.0)), (0, {"bf16": True}, (14.0, 16.0)),
    (1, {}, (10.0, 12.0886)), (1, {"bf16": True}, (8.0, 9.0443)),
    (2, {}, (10.0, 12.0886)), (2, {"bf16": True}, (8.0, 9.0443)),
    (3, {}, (11.2214, 11.2214)), (3, {"bf16": True}, (8.6107, 8.6107)),
    (2, {"offload": "cpu"}, (14.6343, 14.6343)), (2, {"offload": "cpu", "bf16": True}, (11.3172, 11.3172)),
    (3, {"offload": "cpu"}, (13.2214, 13.2214)), (3, {"offload": "cpu", "bf16": True}, (10.6107, 10.6107))])
def test_bytes_of_the_hand_made_ledger(stage, options, bytes_each):
    """Bytes per parameter on rank 0, at rest and after backward."""
    assert (per_parameter("always", stage, **options), per_parameter("gradients", stage, **options)) == \
        pytest.approx(bytes_each, abs=2e-4)


@pytest.mark.parametrize("stage,accumulation,zero,payload", [
    (0, 1, {}, 13_228_036), (0, 2, {}, 13_228_036), (1, 1, {}, 26_456_068), (1, 2, {}, 26_456_068),
    (2, 1, {}, 26_456_068), (2, 2, {}, 39_684_100), (3, 1, {}, 26_456_072), (3, 2, {}, 52_873_224),
    (3, 1, {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}, 40_693_768)])
def test_payload_of_the_hand_made_ledger(stage, accumulation, zero, payload):
    rows = deepspeed_traffic.traffic(HAND, config(stage, **zero), ranks=2, accumulation=accumulation)
    assert sum(row.payload_bytes for row in rows) == payload
    assert all(row.why for row in rows)


def test_constants_are_those_of_the_installed_release(launch):
    assert launch(constants, ranks=1).good()[0] == (deepspeed_memory.MIN_SWAP_BYTES, deepspeed_memory.SWAP_ALIGN_BYTES,
                                                    deepspeed_traffic.FALLBACK_BUCKET)


def constants():
    def rank():
        import inspect

        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.swap_tensor import utils
        fallback = inspect.signature(DeepSpeedEngine.buffered_allreduce_fallback).parameters["elements_per_buffer"].default
        return utils.MIN_AIO_BYTES, utils.AIO_ALIGNED_BYTES, fallback
    return rank


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_what_the_paper_counts_is_there_on_all_ranks_together(stage, ranks):
    """Optimizer states of all ranks are the whole model's, padding apart; so are the weights' shares of stage 3."""
    tensors = Tensors((1001, 7, 500, 333))
    items = [item for rank in range(ranks)
             for item in deepspeed_memory.memory(tensors, config(stage, bf16=True), ranks=ranks, rank=rank) if item.in_paper]
    sums = {kind: sum(item.nbytes for item in items if item.kind == kind) for kind in ("master", "optimizer", "parameter")}
    padding = 2 * ranks if stage < 3 else ranks * len(tensors.numels)
    assert 0 <= sums["master"] - 4 * tensors.count <= 4 * padding
    assert sums["optimizer"] == 2 * sums["master"]
    if stage == 3:
        assert 0 <= sums["parameter"] - 2 * tensors.count <= 2 * padding
    else:
        assert sums["parameter"] == 2 * tensors.count * ranks
    paper = formulas.zero_state_bytes_by_kind(params=tensors.count, ranks=ranks, stage=stage, recipe=MIXED)
    assert sums["optimizer"] / ranks == pytest.approx(paper["optimizer"], abs=8 * padding)


def test_partitions_cover_the_flat_group_once():
    tensors = Tensors((1001, 7, 500))
    for ranks in (1, 2, 3, 5, 8):
        bounds = [deepspeed_memory.partition_bounds(tensors, ranks, rank) for rank in range(ranks)]
        flat = bounds[0][2]
        assert flat >= tensors.count and flat % (2 * ranks) == 0 and flat - tensors.count < 2 * ranks
        assert [start for start, _, _ in bounds] == [0] + [end for _, end, _ in bounds[:-1]] and bounds[-1][1] == flat
        assert len({end - start for start, end, _ in bounds}) == 1


def test_a_tensor_that_straddles_two_shares_is_kept_by_both():
    straddling = deepspeed_memory.memory(Tensors((600, 600, 600)), config(2), ranks=2, rank=0)
    whole = deepspeed_memory.memory(Tensors((600, 300, 300, 600)), config(2), ranks=2, rank=0)
    name = "rest of tensors that straddle the share"
    assert [item.nbytes for item in straddling if item.name == name] == [4 * 300]
    assert not [item for item in whole if item.name == name]


def test_tensors_up_to_the_threshold_persist_with_their_padding():
    tensors = Tensors((10, 101, 1000))
    for threshold, elements in ((9, 0), (10, 10), (101, 10 + 102), (1000, 10 + 102 + 1000)):
        items = deepspeed_memory.memory(tensors, config(3, stage3_param_persistence_threshold=threshold), ranks=2)
        assert sum(item.nbytes for item in items if item.name.startswith("persistent")) == 4 * elements


@pytest.mark.parametrize("numels,size,sent", [
    ([4, 4, 4], 8, [8, 4]), ([4, 4, 4], 12, [12]), ([4, 9, 4], 8, [4, 9, 4]), ([9], 8, [9]), ([], 8, []), ([8, 8], 8, [8, 8])])
def test_buckets(numels, size, sent):
    assert deepspeed_traffic.buckets(numels, size) == sent


def test_calls_are_predicted_only_where_they_are_known():
    tensors = Tensors((100, 100, 100))
    calls = [[row.calls for row in deepspeed_traffic.traffic(tensors, config(2, reduce_bucket_size=size), ranks=2,
                                                             accumulation=2) if row.phase == "backward"] for size in (200, 99)]
    assert calls == [[2 * 2], [None]]


@pytest.mark.parametrize("live,reuse,keeps", [(10**9, 10**9, "all"), (0, 0, "none"), (10**9, 0, "none"), (10**9, 800, "all"),
                                              (10**9, 799, "some"), (299, 10**9, "some"), (300, 800, "all")])
def test_what_stage_3_keeps(live, reuse, keeps):
    """A weight's next use lies up to twice the model away, uses of tied weights included: here 2 * (300 + 100)."""
    zero = {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": reuse}
    assert deepspeed_traffic.stage3_keeps(Tensors((100, 200), (100,)), zero) == keeps


def test_defaults_of_a_config_that_says_nothing():
    items = deepspeed_memory.memory(HAND, {"zero_optimization": {"stage": 3}}, ranks=2)
    assert max(items, key=lambda item: item.nbytes).name == "bucket of gradients to reduce"     # 5e8 elements
    assert deepspeed_memory.by_kind(items)["buffer"] == 4 * 500_000_000
    assert deepspeed_memory.memory(HAND, {}, ranks=2) == deepspeed_memory.memory(
        HAND, {"zero_optimization": {"stage": 0}}, ranks=2)
    assert deepspeed_traffic.traffic(HAND, config(2), ranks=1) == []


def test_differences_sum_up_to_the_gap():
    for stage in range(4):
        for bf16 in (False, True):
            for rank in range(3):
                items = deepspeed_memory.memory(Tensors((1001, 7, 500)), config(stage, bf16=bf16), ranks=3, rank=rank)
                paper = formulas.zero_state_bytes_by_kind(params=1508, ranks=3, stage=stage)
                rows = deepspeed_memory.differences(items, paper)
                assert sum(nbytes for _, nbytes in rows) == (sum(item.nbytes for item in items)
                                                             - sum(round(nbytes) for nbytes in paper.values()))
                assert [abs(nbytes) for _, nbytes in rows] == sorted((abs(nbytes) for _, nbytes in rows), reverse=True)


def test_tensors_of_a_shape():
    tensors = deepspeed_memory.of_shape(MODELS["gpt2"])
    assert tensors.count == 124_439_808 and tensors.reused == (50257 * 768,)
    untied = ModelShape(layers=1, hidden=8, heads=2, vocab=10, seq=4, tied=False)
    assert deepspeed_memory.of_shape(untied).reused == ()
