"""Shapes, layouts and recipes refuse what no model and no cluster can have."""

import dataclasses

import pytest

from yardstick.shapes import FP32, MIXED, MODELS, PAPER, Layout, ModelShape, config_json, from_config_json

GOOD = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 100, "seq": 16}


@pytest.mark.parametrize("change,message", [
    ({"layers": 0}, "layers=0"), ({"vocab": -1}, "vocab=-1"), ({"heads": 5}, "heads=5 does not divide hidden=64"),
    ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"), ({"experts": 4}, "top_k=0"),
    ({"experts": 4, "top_k": 5}, "top_k=5 must lie between 1 and experts=4")])
def test_shapes_that_cannot_be(change, message):
    ModelShape(**GOOD)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ModelShape(**{**GOOD, **change})


def test_widths_that_follow():
    assert ModelShape(**GOOD).ffn_width == 256 and ModelShape(**GOOD, ffn=100).ffn_width == 100
    assert ModelShape(**GOOD).kv_hidden == 64 and ModelShape(**GOOD, kv_heads=2).kv_hidden == 32


@pytest.mark.parametrize("change,message", [
    ({"dp": 0}, "dp=0"), ({"micro_batch": 0}, "micro_batch=0"), ({"zero": 4}, "zero=4"),
    ({"ep": 3}, "ep=3 does not divide")])
def test_layouts_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        Layout(**{"dp": 4, "cp": 2, **change})


def test_world_counts_every_axis_but_experts():
    assert Layout(dp=2, tp=3, pp=5, cp=7, ep=2).world == 2 * 3 * 5 * 7


def test_shapes_are_values():
    assert ModelShape(**GOOD) == ModelShape(**GOOD) and len({ModelShape(**GOOD), ModelShape(**GOOD)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODELS["tiny"].layers = 3


def test_tiny_is_large_enough_for_every_strategy():
    """On two ranks the shares of its MLP's matrices are the MiB in bf16 from which DeepSpeed uses files."""
    tiny = MODELS["tiny"]
    assert tiny.hidden >= 512 and tiny.hidden * tiny.ffn_width * MIXED.parameter // 2 >= 2**20


def test_recipes():
    assert PAPER.optimizer == 12 and PAPER.total == 16             # ZeRO, arXiv 1910.02054, section 3.1: K = 12
    assert (MIXED.total, FP32.total, FP32.master) == (16, 16, 0)   # fp32 weights are their own master


@pytest.mark.parametrize("shape", MODELS.values(), ids=[*MODELS])
def test_a_config_json_and_back(shape):
    assert from_config_json(config_json(shape)) == (shape, [])


def test_shapes_without_a_config_json():
    with pytest.raises(ValueError, match="experts"):
        config_json(ModelShape(**GOOD, experts=2, top_k=1))
    with pytest.raises(ValueError, match="GPT-2 has as many as heads=4"):
        config_json(ModelShape(**GOOD, kv_heads=2))


def test_what_a_shape_leaves_out_is_noted():
    fields = {**config_json(MODELS["gpt2"]), "resid_pdrop": 0.1}
    assert "dropout" in from_config_json(fields)[1][0]
    fields = {**config_json(MODELS["mistral-7b"]), "model_type": "mistral", "sliding_window": 4096}
    assert from_config_json(fields)[0] == MODELS["mistral-7b"] and "window of 4096" in from_config_json(fields)[1][0]
