"""Memory of the installed release: against a ledger made elsewhere, its own constants, and the paper."""

import pytest

from yardstick import deepspeed_memory, formulas
from yardstick.deepspeed_memory import Tensors
from yardstick.shapes import MIXED, MODELS, ModelShape

# The model and settings of a ledger that was made by hand before this project: 3,307,008 parameters, two ranks.
HAND = deepspeed_memory.of_shape(ModelShape(layers=4, hidden=256, heads=4, vocab=512, seq=64))


def config(stage, *, bf16=False, offload=None, **zero):
    given = {"gradient_clipping": 1.0, "optimizer": {"type": "AdamW", "params": {}}, "bf16": {"enabled": bf16},
             "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000,
                                   "stage3_param_persistence_threshold": 1000, **zero}}
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


def test_constants_are_those_of_the_installed_release(launch):
    ours = deepspeed_memory.MIN_SWAP_BYTES, deepspeed_memory.SWAP_ALIGN_BYTES
    assert launch(constants, ranks=1).good() == [ours]


def constants():
    def rank():
        from deepspeed.runtime.swap_tensor import utils
        return utils.MIN_AIO_BYTES, utils.AIO_ALIGNED_BYTES
    return rank


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_what_the_paper_counts_is_there_on_all_ranks_together(stage, ranks):
    """Optimizer states of all ranks are the whole model's, padding apart; so are the weights of stage 3."""
    tensors = Tensors((1001, 7, 500, 333))
    given = config(stage, bf16=True)
    held = [deepspeed_memory.memory(tensors, given, ranks=ranks, rank=rank) for rank in range(ranks)]
    sums = {kind: sum(item.nbytes for items in held for item in items if item.in_paper and item.kind == kind)
            for kind in ("master", "optimizer", "parameter")}
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
        assert [start for start, _, _ in bounds] == [0] + [end for _, end, _ in bounds[:-1]]
        assert bounds[-1][1] == flat
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


def test_defaults_of_a_config_that_says_nothing():
    items = deepspeed_memory.memory(HAND, {"zero_optimization": {"stage": 3}}, ranks=2)
    assert max(items, key=lambda item: item.nbytes).name == "bucket of gradients to reduce"     # 5e8 elements
    assert deepspeed_memory.by_kind(items)["buffer"] == 4 * 500_000_000
    assert deepspeed_memory.memory(HAND, {}, ranks=2) == deepspeed_memory.memory(
        HAND, {"zero_optimization": {"stage": 0}}, ranks=2)


def test_differences_sum_up_to_the_gap():
    for stage in range(4):
        for bf16 in (False, True):
            for rank in range(3):
                tensors = Tensors((1001, 7, 500))
                items = deepspeed_memory.memory(tensors, config(stage, bf16=bf16), ranks=3, rank=rank)
                paper = formulas.zero_state_bytes_by_kind(params=1508, ranks=3, stage=stage)
                rows = deepspeed_memory.differences(items, paper)
                assert sum(nbytes for _, nbytes in rows) == (sum(item.nbytes for item in items)
                                                             - sum(round(nbytes) for nbytes in paper.values()))
                sizes = [abs(nbytes) for _, nbytes in rows]
                assert sizes == sorted(sizes, reverse=True)


def test_tensors_of_a_shape():
    tensors = deepspeed_memory.of_shape(MODELS["gpt2"])
    assert tensors.count == 124_439_808 and tensors.reused == (50257 * 768,)
    untied = ModelShape(layers=1, hidden=8, heads=2, vocab=10, seq=4, tied=False)
    assert deepspeed_memory.of_shape(untied).reused == ()
