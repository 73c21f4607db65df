"""02: expert parallel 2 equals 1, what gates drop and exchanges send is what formulas say, norms, accuracy, what is refused."""

import json
import os
import runpy
import subprocess
import sys

import pytest

from yardstick import images, results

SCRIPT = "annotated_scripts/02_cifar10_annotated.py"
TINY = ["images_made=128", "micro_batch=8", "hidden=16"]
BYTES = {"fp32": 4, "bf16": 2}


def ran(*settings, ranks=2):
    """(exit code, stdout, stderr) of the script on CPU ranks."""
    done = subprocess.run([sys.executable, SCRIPT, *settings], cwd=results.ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "DS_ACCELERATOR": "cpu", "RANKS": str(ranks)})
    return done.returncode, done.stdout, done.stderr


def recorded(folder, *settings, ranks=2):
    code, _, error = ran(*settings, f"output={folder}", ranks=ranks)
    assert code == 0, error
    return json.loads((folder / "record.json").read_text())


def moe_records(proved):
    """{stage and precision: record} of the proof runs with experts."""
    _, records = proved("02")
    found = {record["settings"]["stage"] + record["settings"]["precision"]: record for record in records}
    assert set(found) == {"2fp32", "0fp32", "1bf16", "3fp32", "0bf16"}
    return {name: record for name, record in found.items() if name != "3fp32"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_expert_parallel_2_equals_1(proved):
    """The same losses with each expert on one rank and on both; in stage 2 with gate noise, drops and clipping at work."""
    runs = moe_records(proved)
    for name, most in {"2fp32": 1e-5, "0fp32": 1e-5, "1bf16": 5e-3}.items():
        measured = runs[name]["measured"]
        assert measured["loss_difference_nats_max"] < most, name
        assert measured["expert_parameters"] == runs[name]["predicted"]["expert_parameters"] > 0
    assert runs["2fp32"]["settings"]["noise"] == "RSample" and runs["2fp32"]["settings"]["experts"] == "2,4"
    assert runs["2fp32"]["measured"]["layer_2_dropped_tokens"] > 0
    assert runs["2fp32"]["measured"]["gradient_norm"] > 2 * runs["2fp32"]["settings"]["clip"]


@pytest.mark.slow
def test_capacity_drops_and_bytes_are_those_of_the_formulas(proved):
    runs = moe_records(proved)
    for name, record in runs.items():
        for key in record["predicted"]:
            if key.startswith("layer_") or key == "sent_per_step_bytes":
                assert record["measured"][key] == record["predicted"][key], (name, key)
    tokens = 8 * 16                                  # images of a micro-batch, places of the feature map
    two, four = 52, 26                               # ceil(0.8 * tokens / experts)
    record = runs["2fp32"]
    assert [record["measured"][f"layer_{n}_capacity_tokens"] for n in (1, 2)] == [two, four]
    assert record["measured"]["sent_per_step_bytes"] == 4 * (2 * two + 4 * four) * 16 * BYTES["fp32"] / 2
    record = runs["1bf16"]
    assert record["measured"]["layer_1_capacity_tokens"] == 1.25 * 2 * tokens / 4
    assert record["measured"]["sent_per_step_bytes"] == 4 * 4 * 80 * 16 * BYTES["bf16"] / 2


@pytest.mark.slow
def test_only_zero_clips_by_the_norm_of_the_whole_gradient(proved):
    """With experts apart, stage 0 takes a smaller one: the mean over ranks in fp32, the dense weights' alone in bf16."""
    _, records = proved("02")
    for record in records:
        whole, taken = record["predicted"]["gradient_norm"], record["measured"]["gradient_norm"]
        if record["settings"]["stage"] == "0":
            assert 0.9 * whole < taken < 0.9995 * whole
        else:
            assert taken == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_the_first_two_updates_have_rate_0(proved):
    _, records = proved("02")
    for record in records:
        rates = record["details"]["rates"]
        assert rates[:2] == [0, 0] and all(rate > 0 for rate in rates[2:])
        assert record["measured"]["idle_steps"] == record["predicted"]["idle_steps"] == 2


@pytest.mark.slow
def test_it_learns_on_four_ranks_with_two_sets_of_experts(tmp_path):
    """Each set over two ranks. Every test image is counted once, though the last forwards of some ranks hold none of them."""
    record = recorded(tmp_path, "images_made=1000", "micro_batch=16", "hidden=32", "experts=4", "expert_parallel=2", "steps=120",
                      "learning_rate=4e-3", ranks=4)
    measured = record["measured"]
    assert measured["loss_nats_first"] > 2.2 and measured["loss_nats_last"] < 1.2
    assert measured["accuracy_fraction"] > 0.5
    assert measured["loss_difference_nats_max"] < 1e-5
    _, (_, labels) = images.load(made=1000, seed=1)
    assert record["details"]["images"] == [sum(labels == one) for one in range(10)]


@pytest.mark.slow
def test_the_real_set_is_read_from_a_folder(tmp_path):
    """A small one in the binary format. One rank: nothing to compare with, and no exchange."""
    for n, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        pixels, labels = images.draw(20, seed=n)
        (tmp_path / f"{name}.bin").write_bytes(b"".join(bytes([one]) + row.tobytes() for one, row in zip(labels, pixels)))
    record = recorded(tmp_path / "run", f"images={tmp_path}", "micro_batch=8", "hidden=16", "steps=14", ranks=1)
    assert sum(record["details"]["images"]) == 20 and len(record["details"]["losses"]) == 14
    assert "sent_per_step_bytes" not in record["measured"]


def here(arguments, ranks, out):
    """The script in this process, which has the slow imports behind it; what it writes goes to the file `out`."""
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    os.environ["RANKS"], sys.argv = str(ranks), [SCRIPT, *arguments]
    runpy.run_path(str(results.ROOT / SCRIPT), run_name="__main__")


@pytest.mark.parametrize("settings, ranks, says", [
    ("stepz=3", 2, "Did you mean steps?"),
    ("stage=3", 2, "stage=3 with experts=2,4: DeepSpeed refuses experts in ZeRO-3"),
    ("expert_parallel=2", 3, "expert_parallel=2 does not divide 3 ranks and experts=2,4. Give expert_parallel=1"),
    ("experts=3 expert_parallel=2", 2, "Give expert_parallel=1"),
    ("experts=2,x", 2, "experts=2,x is not one number per layer"),
    ("top_k=3", 2, "top_k=3 is more than a layer of experts=2,4 has"),
    ("experts=4 top_k=3 noise=RSample", 2, "Give noise=Jitter"),
    ("min_capacity=9999", 2, "more than the 512 tokens"),
    ("images=no/such/folder", 2, "images=no/such/folder cannot be read"),
    ("images_made=10", 2, "10 images are too few"),
    ("steps=0", 2, "steps=0 is no number from 1 to"),
    ("steps=9999999999", 2, "from 1 to 1000000"),
    ("images_made=9999999999", 2, "images_made=9999999999 is no number from 1 to 20000"),
    ("hidden=9999999999", 2, "from 2 to 1024"),
    ("experts=9999999999", 2, "Give experts=2,4 hidden=64"),
    ("experts=0,900 hidden=1024", 2, "Give experts=2,4 hidden=64"),
    ("micro_batch=1000 capacity_factor=9", 2, "Give micro_batch=32"),
    ("micro_batch=1000 experts=500 hidden=16 min_capacity=16000", 2, "Give micro_batch=32"),
    ("clip=nan", 2, "clip=nan"),
    ("record=No/Label", 2, "No/Label"),
    ("precision=fp16", 2, "precision=fp16: this device does not compute in it. Give precision=fp32"),
])
def test_what_cannot_work_is_refused_in_one_message(server, tmp_path, settings, ranks, says):
    if settings == "precision=fp16":
        import torch
        if torch.ops.mkldnn._is_mkldnn_fp16_supported():
            pytest.skip("this processor computes in fp16")
    process = server.Process(target=here, args=(settings.split(), ranks, str(tmp_path / "out")))
    process.start()
    process.join(60)
    text = (tmp_path / "out").read_text()
    assert process.exitcode not in (0, None) and says in text, text
    assert "Traceback" not in text and len(text.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    code, _, error = ran(*TINY, "learning_rate=1e30", "steps=6", f"output={tmp_path}")
    assert code and "Traceback" not in error and error.count("lower the learning_rate") == 1
