"""What cannot work is refused before a rank starts: one message says what is wrong, where, and what to do."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

import real_model_example
from strategies import checks, effective
from tests.strategies import cases
from yardstick import op_cache, ranks
from yardstick.settings import SettingsError, override

PREPARE = op_cache.prepare


@pytest.fixture(autouse=True)
def cpu(monkeypatch, tmp_path):
    """Two CPU ranks, whatever the machine and the caller's environment; starting one is an error of the test."""
    for name in (*cases.OF_LAUNCHERS, "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("DS_ACCELERATOR", "cpu"), ("RANKS", "2"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "start", lambda *_, **__: pytest.fail("ranks were started"))
    monkeypatch.setattr(op_cache, "prepare", lambda ops, say: None)


def refusal(*arguments):
    """The message with which `python real_model_example.py ARGUMENTS` ends."""
    settings = override(real_model_example.CONFIG, arguments, where="real_model_example.py")
    with pytest.raises(SettingsError) as caught:
        checks.check(settings)
    return str(caught.value)


def agrees(message, *parts):
    """One message of whole sentences that holds each of the parts."""
    assert "\n" not in message and message.endswith((".", "?"))
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


WORDS = [
    ("stepz=5", ["stepz=5", "real_model_example.py", "Did you mean steps?"]),
    ("accumulations=2", ["Did you mean accumulation?"]),
    ("qqq=1", ["unknown setting qqq=1", "Settings: strategy,"]),
    ("zero2", ["'zero2' is not key=value"]),
    ("strategy=zero4", ["strategy=zero4", "dp, zero1", "Did you mean strategy=zero"]),
    ("precision=fp8", ["precision=fp8", "auto, fp32, bf16, fp16"]),
    ("steps=many", ["steps=many is not a whole number", "steps=20"]),
    ("steps=2.5", ["steps=2.5 is not a whole number"]),
    ("learning_rate=high", ["learning_rate=high is not a number"]),
    ("learning_rate=nan", ["learning_rate=nan is not a finite number"]),
    ("compile=maybe", ["compile=maybe is not True or False"]),
]


@pytest.mark.parametrize("argument,parts", WORDS, ids=[argument for argument, _ in WORDS])
def test_words_of_the_command(argument, parts):
    with pytest.raises(SettingsError) as caught:
        override(real_model_example.CONFIG, [argument], where="real_model_example.py")
    agrees(str(caught.value), *parts)


TOGETHER = [
    (["steps=0"], ["steps=0 must be at least 1"]),
    (["eval_batches=-1"], ["eval_batches=-1 must be at least 0"]),
    (["global_batch=7"], ["global_batch=7", "2 ranks", "RANKS="]),
    (["global_batch=8", "micro_batch=3"], ["global_batch=8 cannot be divided by micro_batch=3 x 2 ranks",
                                             "global_batch=6"]),
    (["global_batch=8", "accumulation=3"], ["accumulation=3 x 2 ranks = 6", "no whole micro_batch"]),
    (["global_batch=8", "micro_batch=2", "accumulation=3"],
     ["global_batch=8 is not micro_batch=2 x accumulation=3 x 2 ranks = 12", "Leave one of the three out"]),
    (["micro_batch=0"], ["micro_batch=0 must be at least 1"]),
    (["seq=257", "model=tiny"], ["seq=257 is longer than the model's 256 positions", "seq=256"]),
    (["seq=1"], ["seq=1", "at least 2 tokens"]),
    (["model=gpt2-larg"], ["model=gpt2-larg", "Did you mean model=gpt2-large?"]),
    (["model=/no/such/folder"], ["model=/no/such/folder", "tiny, gpt2", "path of a folder"]),
    (["model=tiny", "pretrained=True"], ["tiny has no published weights", "model=gpt2"]),
    (["data=/no/such/text"], ["data=/no/such/text does not exist", "text file"]),
    (["tokenizer=/no/such/folder"], ["tokenizer=/no/such/folder", "None for the embedded one"]),
    (["seed=-1"], ["seed=-1 must be at least 0"]),
    (["timeout_seconds=0"], ["timeout_seconds=0.0 must be at least 1"]),
    (["strategy=zero3", "max_live=-5"], ["max_live=-5 must be at least 0"]),
    (["strategy=infinity", "precision=fp32"], ["precision=fp32 does not work with strategy=infinity", "bf16"]),
    (["strategy=zero2", "persistence_threshold=10"],
     ["persistence_threshold=10", "stage 3", "strategy=zero2 is stage 2"]),
    (["strategy=dp", "max_live=10"], ["max_live=10", "stage 3", "strategy=zero3 or infinity"]),
    (["config=/no/such.json"], ["no config file /no/such.json", "config="]),
    (["strategy=infinity", "nvme_path=/no/such/disk"],
     ["nvme_path=/no/such/disk is no folder", "leave nvme_path= out"]),
]


@pytest.mark.parametrize("arguments,parts", TOGETHER, ids=[" ".join(arguments) for arguments, _ in TOGETHER])
def test_what_does_not_fit_together(arguments, parts):
    agrees(refusal(*arguments), *parts)


def test_fp16_where_the_device_has_none():
    from deepspeed.accelerator import get_accelerator
    if get_accelerator().is_fp16_supported():
        pytest.skip("this processor has fp16 arithmetic that DeepSpeed uses")
    agrees(refusal("precision=fp16"), "precision=fp16", "bf16 or fp32")


@pytest.mark.parametrize("text", ["abc", "0", "-1", "2.0", ""])
def test_number_of_ranks(monkeypatch, text):
    monkeypatch.setenv("RANKS", text)
    agrees(refusal("model=tiny"), f"RANKS={text} is not a number of ranks", "RANKS=2")


def test_config_file_that_is_no_json(tmp_path):
    (tmp_path / "broken.json").write_text('{"optimizer": {"type": "AdamW"')
    agrees(refusal(f"config={tmp_path / 'broken.json'}"), str(tmp_path / "broken.json"), "line", "Mend")


@pytest.mark.parametrize("text", ["[1, 2]", "3", '"zero"'])
def test_config_file_that_is_no_object(tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    agrees(refusal(f"config={tmp_path / 'list.json'}"), str(tmp_path / "list.json"), "JSON object",
           "3_zero_stage2/config.json")


def test_config_that_is_a_folder(tmp_path):
    agrees(refusal(f"config={tmp_path}"), str(tmp_path), "JSON file")


@pytest.mark.parametrize("change,words", [
    ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, "ZeRO fails with this optimizer"),
    ({"prescale_gradients": True}, "fails at stages 2 and 3"),
    ({"checkpoint": {"load_universal": True}}, "are set by this program")])
def test_config_of_which_the_linter_knows_that_it_fails(tmp_path, change, words):
    given = json.loads((cases.ROOT / "strategies/3_zero_stage2/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**given, **change}))
    agrees(refusal("model=tiny", f"config={tmp_path / 'config.json'}"), words)


def test_a_folder_without_weights(tmp_path):
    folder = cases.model_folder(tmp_path / "model", **cases.SMALL)
    agrees(refusal(f"model={folder}", "pretrained=True", "seq=16"), "has no weights", "safetensors")


def test_texts_that_are_too_short_or_no_text(tmp_path):
    (tmp_path / "short.txt").write_text("three words only")
    agrees(refusal(f"data={tmp_path / 'short.txt'}", "model=tiny"), "fewer than one window of 128",
           "shorter window")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    agrees(refusal(f"data={tmp_path / 'binary'}", "model=tiny"), "binary")


def test_vocabulary_smaller_than_the_tokenizer(tmp_path):
    folder = cases.model_folder(tmp_path / "model", **{**cases.SMALL, "vocab_size": 100})
    agrees(refusal(f"model={folder}", "seq=16"), "4096 tokens", "vocabulary 100", "tokenizer=")


def test_a_compiler_that_torch_compile_needs(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    agrees(refusal("compile=True"), "compile=True needs a C++ compiler", "g++")


def test_a_compiler_that_nvme_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(op_cache, "prepare", PREPARE)
    monkeypatch.setattr(op_cache, "folder", lambda: tmp_path / "ops")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    agrees(refusal("strategy=infinity", "model=tiny", f"output={tmp_path / 'run'}"), "async_io", "g++")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_nvme_folder_that_cannot_be_written(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir(mode=0o500)
    agrees(refusal("strategy=infinity", "model=tiny", f"nvme_path={folder}"), "cannot be written", f"{folder} is",
           "nvme_path=")


def test_nvme_folder_that_access_forbids(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(tmp_path)))
    agrees(refusal("strategy=infinity", "model=tiny", f"nvme_path={tmp_path}"), "cannot be written",
           f"{tmp_path} is", "nvme_path=")


def test_nvme_disk_that_is_too_small(monkeypatch, tmp_path):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**8, 0, 10**8))
    message = refusal("strategy=infinity", "model=tiny", f"nvme_path={tmp_path}")
    agrees(message, "swap files of 2 ranks take 0.2", str(tmp_path), "0.10 GB free", "nvme_path=")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**9))
    checks.check(override(real_model_example.CONFIG, ["strategy=infinity", "model=tiny", f"nvme_path={tmp_path}"]))
    assert not list(tmp_path.iterdir())            # checking writes nothing


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="to mount a disk needs root on Linux")
def test_nvme_disk_of_a_megabyte(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        agrees(refusal("strategy=infinity", "model=tiny", f"nvme_path={tmp_path}"), str(tmp_path), "0.00 GB free")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_output_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        agrees(refusal("model=tiny", f"output={folder}"), f"{folder} cannot be written",
               f"{tmp_path / 'file'} is no folder", "output=")


def test_output_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(tmp_path)))
    agrees(refusal("model=tiny", f"output={tmp_path / 'run'}"), f"{tmp_path} is read-only", "output=")


def test_records_that_could_not_be_committed(tmp_path):
    agrees(refusal("record=../cpu2"), "record label '../cpu2'", "a-z")
    agrees(refusal("record=cpu2", f"model={tmp_path}"), f"model={tmp_path} is a path of this machine",
           "record=cpu2")
    agrees(refusal("record=cpu2", f"data={tmp_path}"), f"data={tmp_path}", "relative path")


# What a good command comes to

def plan(*arguments):
    return checks.check(override(real_model_example.CONFIG, ["model=tiny", *arguments]))


@pytest.mark.parametrize("arguments,triple", [
    ([], (8, 4, 1)), (["global_batch=16"], (16, 4, 2)), (["global_batch=6"], (6, 3, 1)),
    (["micro_batch=2"], (4, 2, 1)),
    (["accumulation=3"], (24, 4, 3)), (["global_batch=12", "micro_batch=2"], (12, 2, 3)),
    (["global_batch=12", "accumulation=2"], (12, 3, 2)), (["micro_batch=2", "accumulation=2"], (8, 2, 2))])
def test_the_batch_is_computed_and_explained(capsys, arguments, triple):
    made = plan(*arguments)
    assert (made.global_batch, made.micro_batch, made.accumulation) == triple
    total, micro, times = triple
    assert (f"batch: {total} sequences a step = {micro} in each forward (micro_batch) x {times} forwards a step "
            "(accumulation) x 2 ranks") in capsys.readouterr().err
    assert made.config["train_micro_batch_size_per_gpu"] == triple[1]
    assert made.config["gradient_accumulation_steps"] == triple[2]
    assert "train_batch_size" not in made.config


def test_settings_replace_keys_of_the_config_and_nothing_else():
    given = json.loads((cases.ROOT / "strategies/4_zero_stage3/config.json").read_text())
    assert plan("strategy=zero3").config == given
    made = plan("strategy=zero3", "learning_rate=0.5", "gradient_clipping=0.25", "max_live=7",
                "max_reuse_distance=8", "persistence_threshold=9", "sub_group_size=10",
                "reduce_bucket_size=11", "precision=bf16").config
    given["optimizer"]["params"]["lr"], given["gradient_clipping"], given["bf16"]["enabled"] = 0.5, 0.25, True
    given["zero_optimization"] |= {"stage3_max_live_parameters": 7, "stage3_max_reuse_distance": 8,
                                   "sub_group_size": 10, "stage3_param_persistence_threshold": 9,
                                   "reduce_bucket_size": 11}
    assert made == given


@pytest.mark.parametrize("strategy,ops,compiled", [
    ("dp", [], ["fused_adam"]), ("zero1", [], ["fused_adam"]), ("zero2", [], ["fused_adam"]),
    ("zero3", [], ["fused_adam"]), ("offload", [], ["cpu_adam"]),
    ("infinity", ["async_io"], ["async_io", "cpu_adam"])])
def test_only_nvme_needs_a_compiler_unless_asked(strategy, ops, compiled):
    assert plan(f"strategy={strategy}").ops == ops
    assert plan(f"strategy={strategy}", "cpp_ops=True").ops == compiled


@pytest.mark.parametrize("schedule,middle", [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_the_learning_rate_rises_and_falls_to_a_tenth(schedule, middle):
    factor = real_model_example.learning_rate_factor(cases.settings(schedule=schedule, warmup_steps=4, steps=24))
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(14) == pytest.approx(middle)
    assert factor(24) == pytest.approx(1.0 if schedule == "constant" else 0.1)
    falling = [factor(step) for step in range(4, 25)]
    assert falling == sorted(falling, reverse=True)
    assert real_model_example.learning_rate_factor(cases.settings(warmup_steps=0, steps=1))(0) == 1.0


def test_an_optimizer_other_than_adam_compiles_nothing():
    assert effective.ops_of({"optimizer": {"type": "SGD", "params": {"lr": 1.0}}}) == []


def test_every_config_writes_out_what_changes_results():
    """Defaults that differ between releases, or that decide memory and traffic."""
    for strategy, folder in cases.FOLDERS.items():
        config = json.loads((cases.ROOT / "strategies" / folder / "config.json").read_text())
        assert config["gradient_clipping"] == 1.0
        assert config["optimizer"]["params"].keys() >= {"lr", "betas", "eps", "weight_decay"}
        assert config["bf16"]["enabled"] is (strategy == "infinity") and config["fp16"]["enabled"] is False
        zero = config["zero_optimization"]
        stage = {"dp": 0, "zero1": 1, "zero2": 2, "offload": 2, "zero3": 3, "infinity": 3}[strategy]
        assert zero["stage"] == stage
        assert stage == 0 or zero.keys() >= {"reduce_bucket_size", "reduce_scatter", "contiguous_gradients",
                                             "overlap_comm"}
        assert stage < 3 or {"sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
                             "stage3_max_live_parameters", "stage3_max_reuse_distance"} <= zero.keys()
        device = {"offload": "cpu", "infinity": "nvme"}.get(strategy)
        assert zero.get("offload_optimizer", {}).get("device") == device


# As users see it

@pytest.mark.parametrize("arguments,environment,parts", [
    (["stepz=2"], {}, ["real_model_example.py: unknown setting stepz=2", "Did you mean steps?"]),
    (["global_batch=7"], {}, ["global_batch=7"]),
    ([], {"RANKS": "abc"}, ["RANKS=abc"])], ids=["key", "batch", "ranks"])
def test_as_a_command(tmp_path, arguments, environment, parts):
    ended = cases.command([sys.executable, "real_model_example.py", f"output={tmp_path / 'run'}", *arguments],
                          **environment)
    assert ended.returncode == 1 and not ended.stdout and "Traceback" not in ended.stderr
    for part in parts:
        assert part in ended.stderr
    assert not (tmp_path / "run").exists()
