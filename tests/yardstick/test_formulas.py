"""Formulas held against models of transformers, against torch's own FLOP counter, and against each other."""

import pytest

from yardstick import formulas
from yardstick.shapes import FP32, MIXED, MODELS, PAPER, Layout, ModelShape

LLAMA = ModelShape(layers=3, hidden=48, heads=6, vocab=101, seq=20, kv_heads=2, ffn=80, gated=True, tied=False)
GPT = ModelShape(layers=3, hidden=48, heads=6, vocab=101, seq=20)


def on_meta(config, **options):
    import torch
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()
    return model


def gpt2(shape, **options):
    from transformers import GPT2Config
    return on_meta(GPT2Config(
        n_layer=shape.layers, n_embd=shape.hidden, n_head=shape.heads, vocab_size=shape.vocab,
        n_positions=shape.seq, n_inner=shape.ffn, tie_word_embeddings=shape.tied, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0), **options)


def llama(shape, **options):
    from transformers import LlamaConfig
    return on_meta(LlamaConfig(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab, intermediate_size=shape.ffn,
        max_position_embeddings=shape.seq, tie_word_embeddings=shape.tied), **options)


@pytest.mark.parametrize("shape", [*(shape for shape in MODELS.values() if not shape.gated), GPT])
def test_tensors_of_gpt2_in_their_order(shape):
    theirs = [tuple(p.shape) for p in gpt2(shape).parameters()]
    assert theirs == [dims for _, dims in formulas.tensor_shapes(shape)]
    assert formulas.param_count(shape) == sum(formulas.numel(dims) for dims in theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_of_llama_in_their_order(tied):
    shape = ModelShape(**{**vars(LLAMA), "tied": tied})
    wanted = {name: tuple(p.shape) for name, p in llama(shape).named_parameters()}
    ours = [dims for _, dims in formulas.tensor_shapes(shape)]
    # torch's linear layers keep (out, in), the formulas (in, out) or either: elements decide about bytes
    assert [formulas.numel(dims) for dims in ours] == [formulas.numel(dims) for dims in wanted.values()]
    assert formulas.param_count(shape) == sum(formulas.numel(dims) for dims in wanted.values())


def test_parameters_of_mixtral():
    from transformers import MixtralConfig
    shape = ModelShape(**{**vars(LLAMA), "experts": 4, "top_k": 2})
    model = on_meta(MixtralConfig(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab, intermediate_size=shape.ffn,
        num_local_experts=shape.experts, num_experts_per_tok=shape.top_k))
    assert formulas.param_count(shape) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape,build", [(GPT, gpt2), (LLAMA, llama)], ids=["gpt2", "llama"])
@pytest.mark.parametrize("batch", [1, 3])
def test_flops_are_those_that_torch_counts(shape, build, batch):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    model = build(shape, attn_implementation="eager")
    tokens = torch.zeros(batch, shape.seq, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    assert counter.get_total_flops() == formulas.train_flops(shape, batch)


def test_recomputation_repeats_the_layers_and_not_the_logits():
    none, selective, full = (formulas.train_flops(GPT, 2, recompute=r) for r in ("none", "selective", "full"))
    logits = 3 * 2 * GPT.hidden * GPT.vocab * 2 * GPT.seq
    assert full - none == (none - logits) / 3
    assert selective - none == 2 * GPT.seq * GPT.layers * 4 * GPT.seq * GPT.hidden


def test_experts_cost_the_active_ones_and_the_router():
    dense = formulas.train_flops(LLAMA, 1)
    sparse = formulas.train_flops(ModelShape(**{**vars(LLAMA), "experts": 4, "top_k": 2}), 1)
    mlp, router = 2 * 3 * LLAMA.hidden * LLAMA.ffn, 2 * LLAMA.hidden * 4
    assert sparse - dense == 3 * LLAMA.seq * LLAMA.layers * (mlp + router)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("recipe", [PAPER, MIXED, FP32], ids=lambda recipe: recipe.name)
def test_one_rank_holds_everything_at_every_stage(stage, recipe):
    assert formulas.zero_state_bytes(params=1000, ranks=1, stage=stage, recipe=recipe) == 1000 * recipe.total


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_each_stage_divides_one_part_more(ranks):
    """Table 1 of the paper: 16, 4 + 12/N, 2 + 14/N and 16/N bytes a parameter."""
    held = [formulas.zero_state_bytes(params=1e9, ranks=ranks, stage=s) / 1e9 for s in range(4)]
    assert held == pytest.approx([16, 4 + 12 / ranks, 2 + 14 / ranks, 16 / ranks])


@pytest.mark.parametrize("options,message", [
    ({"params": 1, "ranks": 1, "stage": 4}, "stage=4"), ({"params": -1, "ranks": 1, "stage": 0}, "params=-1"),
    ({"params": 1, "ranks": 0, "stage": 0}, "ranks=0")])
def test_no_such_stage(options, message):
    with pytest.raises(ValueError, match=message):
        formulas.zero_state_bytes(**options)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(ranks):
    assert formulas.ring_bytes("all_reduce", 960, ranks) == (formulas.ring_bytes("reduce_scatter", 960, ranks)
                                                             + formulas.ring_bytes("all_gather", 960, ranks))
    assert formulas.ring_bytes("all_gather", 960, ranks) == 960 * (ranks - 1) / ranks


def test_the_papers_traffic():
    assert [formulas.zero_traffic_in_parameters(stage) for stage in range(4)] == [2, 2, 2, 3]


def test_activations_shrink_with_what_is_divided_and_recomputed():
    shape = ModelShape(layers=4, hidden=512, heads=8, vocab=1000, seq=256)
    whole = formulas.activation_bytes(shape)
    assert whole == 4 * 256 * 512 * (34 + 5 * 8 * 256 / 512)
    selective, full = (formulas.activation_bytes(shape, recompute=r) for r in ("selective", "full"))
    assert full == 4 * 256 * 512 * 2 and full < selective < whole
    for layout in (Layout(tp=2), Layout(pp=2), Layout(cp=2)):
        assert formulas.activation_bytes(shape, layout) < whole
    assert formulas.activation_bytes(shape, Layout(tp=2), sequence_parallel=True) == whole / 2
    assert formulas.activation_bytes(shape, Layout(micro_batch=3)) == 3 * whole
    with pytest.raises(ValueError, match="recompute"):
        formulas.activation_bytes(shape, recompute="some")
    with pytest.raises(ValueError, match="recompute"):
        formulas.train_flops(shape, 1, recompute="some")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape,recompute", [(LLAMA, "none"), (LLAMA, "full"), (GPT, "none"), (GPT, "full")])
def test_bytes_that_autograd_saves(shape, recompute, precision):
    """One forward of transformers' model on the CPU, counted; tokens and labels, 16 bytes a token, are the batch's own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from yardstick.probe import SavedTensors
    from yardstick.shapes import config_json
    fields = config_json(shape)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).to(getattr(torch, precision))
    model.train()
    if recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.randint(0, shape.vocab, (2, shape.seq))
    with SavedTensors(model) as saved:
        model(input_ids=tokens, labels=tokens)
    estimate = formulas.saved_bytes(shape, micro_batch=2, seq=shape.seq, element_bytes=4 if precision == "float32" else 2,
                                    recompute=recompute)
    assert saved.peak - 16 * tokens.numel() == pytest.approx(estimate, rel=0.01)


def test_qwen2_has_biases_for_queries_keys_and_values():
    plain, biased = LLAMA, ModelShape(**{**vars(LLAMA), "qkv_bias": True})
    assert formulas.param_count(biased) - formulas.param_count(plain) == LLAMA.layers * (LLAMA.hidden + 2 * LLAMA.kv_hidden)
