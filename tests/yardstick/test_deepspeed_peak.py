"""The most that a rank holds at once: predicted moments against torch's own allocator, block by block."""

import pytest

from tests.strategies import cases
from tests.yardstick import peaks
from yardstick import deepspeed_memory, deepspeed_peak
from yardstick.shapes import MODELS, ModelShape, config_json

SMALL = ModelShape(cases.SMALL["n_layer"], cases.SMALL["n_embd"], cases.SMALL["n_head"], cases.SMALL["vocab_size"],
                   cases.SMALL["n_positions"])
WIDE = ModelShape(cases.WIDE["n_layer"], cases.WIDE["n_embd"], cases.WIDE["n_head"], cases.WIDE["vocab_size"],
                  cases.WIDE["n_positions"])
LLAMA = ModelShape(layers=3, hidden=96, heads=6, vocab=4096, seq=64, kv_heads=2, ffn=256, gated=True, tied=False)
SHAPES = {"small": SMALL, "wide": WIDE, "llama": LLAMA, "tiny": MODELS["tiny"], "gpt2": MODELS["gpt2"]}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(server, request, tmp_path_factory):
    """measured(model, strategy, precision, accumulation, **changes) -> [peaks.Peak of each rank]; runs are kept."""
    known = {}

    def of(model, strategy, precision, accumulation, **changes):
        key = model, strategy, precision, accumulation, *sorted(changes.items())
        if key not in known:
            folder = tmp_path_factory.mktemp("peak")
            if model not in MODELS:
                (folder / "model").mkdir()
                peaks.write_json(folder / "model" / "config.json", config_json(SHAPES[model]))
            known[key] = cases.launch(server, folder, peaks.measuring, {
                "strategy": strategy, "model": model if model in MODELS else str(folder / "model"), "precision": precision,
                "accumulation": accumulation, **changes}, seconds=600).good()
        return known[key]
    return of


def check(model, strategy, ranks, recompute="none"):
    """The bytes between steps to the byte, the peak and each phase's peak to 5 %."""
    for one in ranks:
        made = one.made
        items = deepspeed_memory.memory(made["tensors"], made["config"], ranks=made["ranks"], rank=one.rank,
                                        accumulation=made["accumulation"])
        # what async_io pins is not torch's: the buffers on the host of infinity
        pinned = sum(i.nbytes for i in items if i.kind == "buffer" and i.place == "host") if strategy == "infinity" else 0
        moments = {m.name: m for m in deepspeed_peak.peaks(
            SHAPES[model], made["config"], ranks=made["ranks"], rank=one.rank, micro_batch=made["micro_batch"], seq=made["seq"],
            accumulation=made["accumulation"], recompute=recompute, gpu=False)}
        # blocks that threads of async_io have freed unseen count on: they are those between steps that nothing explains
        unseen = one.rest + pinned - sum(moments["step"].rest.values())
        assert unseen == pytest.approx(0, abs=peaks.SCALARS) or (strategy == "infinity" and unseen > 0)
        expected = {"forward": moments["forward"].nbytes, "step": moments["step"].nbytes,
                    "backward": max(m.nbytes for name, m in moments.items() if name in ("backward", "reduction"))}
        found = {phase: one.phases[phase] + pinned - unseen for phase in expected}
        assert expected == pytest.approx(found, rel=0.05)
        assert max(expected.values()) == pytest.approx(max(found.values()), rel=0.05)


@pytest.mark.parametrize("strategy,precision,accumulation",
                         cases.CASES + [pytest.param(*case, marks=slow) for case in cases.OTHERS])
def test_peak_of_small_buckets(measured, request, strategy, precision, accumulation):
    """A model whose embedding is larger than the bucket; with infinity one that has something to swap."""
    model, changes = "small", {"reduce_bucket_size": cases.BUCKET}
    if strategy == "infinity":
        request.getfixturevalue("async_io")
        model, changes = "wide", {}
    check(model, strategy, measured(model, strategy, precision, accumulation, **changes))


@pytest.mark.parametrize("strategy,precision", [("zero2", "fp32"), ("zero3", "bf16"), pytest.param("dp", "bf16", marks=slow)])
def test_peak_of_llama(measured, strategy, precision):
    check("llama", strategy, measured("llama", strategy, precision, 1, micro_batch=2, seq=64, reduce_bucket_size=cases.BUCKET))


@slow
@pytest.mark.parametrize("strategy,precision,accumulation", cases.CASES + cases.OTHERS)
def test_peak_of_the_default_model(measured, request, strategy, precision, accumulation):
    if strategy == "infinity":
        request.getfixturevalue("async_io")
    check("tiny", strategy, measured("tiny", strategy, precision, accumulation, seq=128))


@slow
@pytest.mark.parametrize("strategy,precision,accumulation", [("zero1", "fp32", 2), ("zero3", "bf16", 1), ("offload", "bf16", 1)])
def test_peak_of_gpt2(measured, strategy, precision, accumulation):
    check("gpt2", strategy, measured("gpt2", strategy, precision, accumulation, seq=64))


@slow
def test_peak_with_activation_checkpointing(measured):
    run = measured("tiny", "zero2", "fp32", 1, seq=128, micro_batch=4, activation_checkpointing=True)
    check("tiny", "zero2", run, recompute="full")


def test_buckets_make_stage_3_larger_than_stage_2_on_a_small_model(measured):
    """The bucket of stage 3 is there all the time. The order of what is predicted is that of what is measured."""
    found, expected = {}, {}
    for strategy in ("zero2", "zero3"):
        one = measured("small", strategy, "fp32", 1, reduce_bucket_size=500_000)[0]
        found[strategy] = max(one.phases.values())
        expected[strategy] = deepspeed_peak.largest(deepspeed_peak.peaks(
            SMALL, one.made["config"], ranks=2, micro_batch=1, seq=16, gpu=False)).nbytes
    assert found["zero3"] > found["zero2"] and expected["zero3"] > expected["zero2"]
    assert expected == pytest.approx(found, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["dp", "zero1", "zero2", "zero3", "offload"])
def test_peak_on_a_gpu(tmp_path, strategy):
    """What torch.cuda.max_memory_allocated says in the record of a run on every GPU of this machine."""
    import torch
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    ranks = torch.cuda.device_count()
    words = [f"strategy={strategy}", f"output={tmp_path}", "model=gpt2", "steps=4", "eval_batches=0", "sample_tokens=0",
             "micro_batch=4", "seq=512", "precision=bf16"]
    written = cases.record(cases.command(["python", "real_model_example.py", *words], DS_ACCELERATOR="cuda", RANKS=str(ranks)), tmp_path)
    config = written["details"]["config"]
    moments = deepspeed_peak.peaks(MODELS["gpt2"], config, ranks=ranks, micro_batch=4, seq=512,
                                   accumulation=config["gradient_accumulation_steps"])
    assert written["measured"]["peak_allocated_bytes"] == pytest.approx(
        deepspeed_peak.largest(moments, "device").bytes_on("device"), rel=0.05)


def config(stage, **zero):
    return {"bf16": {"enabled": True}, "gradient_clipping": 1.0, "optimizer": {"params": {"torch_adam": True}},
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000, **zero}}


@pytest.mark.parametrize("stage", range(4))
def test_moments_hold_more_than_rest_and_grow_with_the_batch(stage):
    small, large = (deepspeed_peak.peaks(SMALL, config(stage), ranks=2, micro_batch=micro, seq=64) for micro in (1, 8))
    for one, other in zip(small, large):
        assert one.name == other.name and one.bytes_on("device") <= other.bytes_on("device")
        assert one.name == "start" or one.bytes_on("device") > sum(
            item.nbytes for item in deepspeed_memory.memory(deepspeed_memory.of_shape(SMALL), config(stage), ranks=2)
            if item.moment == "always" and item.place == "device")
        assert all(nbytes > 0 for nbytes in one.parts.values())
    assert deepspeed_peak.largest(large).nbytes > deepspeed_peak.largest(small).nbytes


def test_freed_gathers_hold_one_tensor_and_kept_ones_the_model():
    limits = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
              "stage3_param_persistence_threshold": 0}
    forward = {name: next(m for m in deepspeed_peak.peaks(SMALL, config(3, **zero), ranks=2, micro_batch=1, seq=8)
                          if m.name == "forward").parts["gathered weights", "device"]
               for name, zero in (("freed", limits), ("kept", {"stage3_param_persistence_threshold": 0}))}
    assert forward["freed"] == 2 * SMALL.vocab * SMALL.hidden
    assert forward["kept"] == 2 * deepspeed_memory.of_shape(SMALL).count
