"""07: two axes train what one process trains, cuts, bytes, whole weights, two mistakes, the mask, what is refused."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from yardstick import results

SCRIPT = "annotated_scripts/07_tensor_parallel_annotated.py"
STAGES = ("0", "1", "2", "3")
D, V, L = 128, 4096, 2                     # of the script's own Llama


def ran(folder, *settings, ranks=4):
    """(exit code, stderr, record or None) of the script on CPU ranks."""
    done = subprocess.run([sys.executable, SCRIPT, *settings, f"output={folder}"], cwd=results.ROOT, capture_output=True, text=True,
                          timeout=500, env={**os.environ, "DS_ACCELERATOR": "cpu", "RANKS": str(ranks)})
    record = folder / "record.json"
    return done.returncode, done.stderr, json.loads(record.read_text()) if record.is_file() else None


def trained(record):
    """(stage, what its ranks told) of each stage of a record."""
    return record["details"]["stages"].items()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_axes_train_what_one_process_trains(proved):
    """Sums in another order round differently, 6e-8 of a value in fp32. Adam hides a constant factor, so the norm is compared too:
    one that lacks a tensor rank's parts, or counts whole tensors twice, is off by more than a tenth."""
    _, (both, tensor) = proved("07")
    assert tuple(both["details"]["stages"]) == STAGES
    for record in (both, tensor):
        alone = record["details"]["alone"]
        assert len(alone) == record["settings"]["steps"]
        for stage, told in trained(record):
            for (loss, norm), (expected, expected_norm) in zip(told["steps"], alone, strict=True):
                assert loss == pytest.approx(expected, abs=1e-5)
                assert norm == (0 if stage == "0" else pytest.approx(expected_norm, rel=1e-4))
            assert told["steps"][-1][0] < told["steps"][0][0] - 0.05


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_neighbours_share_a_layer(proved):
    _, (both, tensor) = proved("07")
    for record, R in ((both, 2), (tensor, 4)):
        rows = -(-(V + 1) // R) * R                                   # with the pad token, and up to a multiple of R
        for _, told in trained(record):
            assert [one["place"] for one in told["ranks"]] == [[rank % R, rank // R] for rank in range(4)]
            for one in told["ranks"]:
                cut = one["cut"]
                assert len(cut) == 7 * L + 1
                assert cut["model.layers.0.self_attn.q_proj"] == [[D, D], [D // R, D]]
                assert cut["model.layers.0.self_attn.o_proj"] == [[D, D], [D, D // R]]
                assert cut["model.layers.1.mlp.down_proj"] == [[D, 352], [D, 352 // R]]
                assert cut["lm_head"] == [[rows, D], [rows // R, D]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_bytes_are_those_of_the_formulas(proved):
    """On every rank, to the byte; and the script's formula for the tensor axis is 2 L sums forward, 5 L + 1 backward."""
    _, (both, tensor) = proved("07")
    for record, N in ((both, 2), (tensor, 1)):
        for _, told in trained(record):
            for one in told["ranks"]:
                counted, formula = one["held"]
                assert {"parameter", "optimizer"} <= set(formula)
                assert {kind: counted[kind] for kind in formula} == formula
                counted, formula = one["sent"]
                assert {key: n for key, n in counted.items() if N > 1 or key.startswith("tensor")} == formula
                sums = formula["tensor_forward_all_reduce"]
                assert formula["tensor_backward_all_reduce"] * 2 * L == sums * (5 * L + 1)
                assert formula["tensor_forward_all_gather"] * 2 * L * D == sums * one["cut"]["lm_head"][0][0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_weights_come_out(proved):
    _, (both, _) = proved("07")
    for stage in STAGES:
        told = both["details"]["stages"][stage]["counts"]
        assert told["saved_parts_count"] == (0 if stage == "3" else 7 * L + 1)
        assert told["loaded_loss_nats"] == pytest.approx(told["saved_loss_nats"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_mistakes_are_what_the_script_says(proved):
    _, (both, tensor) = proved("07")
    for record, R in ((both, 2), (tensor, 4)):
        measured = record["measured"]
        assert abs(measured["seed_per_rank_loss_nats"] - measured["whole_model_loss_nats"]) > 1e-4
        assert "Data inconsistency within the TP group" in record["details"]["refused"]
        assert measured["stage1_train_batch_size_count"] == R * record["predicted"]["stage1_train_batch_size_count"]


@pytest.mark.slow
def test_two_ranks_of_one_tensor_group_and_examples_of_the_user(tmp_path):
    """Without an input; in bf16, where 8 bits of a value are kept."""
    examples = [{"instruction": f"Add {a} and {b}.", "output": str(a + b)} for a in range(8) for b in range(8)]
    (tmp_path / "add.json").write_text(json.dumps(examples))
    code, errors, record = ran(tmp_path / "run", f"data={tmp_path}/add.json", "steps=3", "dtype=bf16", ranks=2)
    assert code == 0, errors
    assert record["measured"]["stage1_one_process_gap_nats_max"] < 0.05
    for key in ("held_parameter", "held_master", "sent_tensor_forward_all_reduce", "sent_tensor_step_all_reduce"):
        assert record["measured"][f"stage1_{key}_bytes"] == record["predicted"][f"stage1_{key}_bytes"]


def test_only_answers_are_learned(monkeypatch):
    """The labels are the answer and the end, at their own places; padding is neither seen nor learned."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    spec = importlib.util.spec_from_file_location("script_07", results.ROOT / SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    settings = {"model": None, "data": None, "max_tokens": 96, "micro_batch": 4, "accumulation": 2, "tensor": 2}
    coder, pairs, size = script.prepare(SimpleNamespace(settings=settings, world=4))
    assert size == 16 and len(pairs) % 16 == 0
    example, *_ = script.questions(None)
    ids, labels = pairs[0]
    learned = labels != -100
    assert (ids[learned] == labels[learned]).all()
    assert coder.decode(labels[learned]) == example["output"] + coder.eos_token
    assert coder.decode(ids[~learned]).endswith("### Answer\n") and example["input"] in coder.decode(ids[~learned])
    batch = next(script.endless(pairs, 4, 2, 0, 1, coder.pad_token_id, "cpu"))
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == batch["labels"].shape == (4, lengths.max())
    for row, length in enumerate(lengths):
        assert (batch["input_ids"][row, length:] == coder.pad_token_id).all() and (batch["labels"][row, length:] == -100).all()
        assert batch["input_ids"][row, length - 1] == coder.eos_token_id and batch["attention_mask"][row, :length].all()


@pytest.mark.parametrize("settings, says", [
    pytest.param(settings.split(), says, marks=() if settings == "tensor=3" else pytest.mark.slow)
    for settings, says in [
        ("tensors=2", "Did you mean tensor?"), ("tensor=3", "tensor=3 does not cut 4 ranks"), ("tensor=1", "two or more"),
        ("stage=1,4", "stage=1,4 is none of 0 to 3"), ("stage=0 dtype=bf16", "give stage=1"), ("steps=1", "The least are"),
        ("model=nowhere/nothing", "cannot use model=nowhere/nothing"), ("data=nowhere.json", "No such file"),
        ("max_tokens=10", "lower micro_batch")]])
def test_bad_input_gives_one_message(tmp_path, settings, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, errors, _ = ran(tmp_path, *settings)
    assert code and says in errors and "Traceback" not in errors and len(errors.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_model_without_a_plan_is_refused(tmp_path):
    from transformers import GPT2Config, PreTrainedTokenizerFast

    from yardstick.data import END, TOKENIZER
    GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=V).save_pretrained(tmp_path / "gpt2")
    PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), eos_token=END).save_pretrained(tmp_path / "gpt2")
    code, errors, _ = ran(tmp_path / "run", f"model={tmp_path}/gpt2")
    assert code and "no plan of plain cuts" in errors and "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("found, says", [({"instruction": "a"}, "example 0"), ([{"instruction": "a", "output": "b"}, {"output": 3}], "example 1")])
def test_data_of_another_form_is_refused(tmp_path, found, says):
    (tmp_path / "data.json").write_text(json.dumps(found))
    code, errors, _ = ran(tmp_path / "run", f"data={tmp_path}/data.json")
    assert code and says in errors and '"output": "5"' in errors and len(errors.strip().splitlines()) == 1
