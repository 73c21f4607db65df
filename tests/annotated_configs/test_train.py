"""The annotated configs train as they stand: real ranks, real files, losses that fall, and what their notes say of ZenFlow."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.strategies import cases
from yardstick import deepspeed_config
from yardstick.results import ROOT

CONFIGS = ROOT / "annotated_configs"


@pytest.fixture(scope="session")
def trained(tmp_path_factory, request):
    """trained(config, *settings) -> (record, what it printed, {swap file: [(bytes, when written), ...] while it trained}); kept."""
    request.getfixturevalue("compiled_adams")
    known = {}

    def run(config, *settings):
        key = str(config), settings
        if key in known:
            return known[key]
        if "nvme" in str(config):
            request.getfixturevalue("async_io")
        folder = tmp_path_factory.mktemp("trained")              # nvme_path is relative to it
        log = open(folder / "log", "w+")
        process = subprocess.Popen([sys.executable, CONFIGS / "train.py", f"config={config}", f"output={folder}", *settings], cwd=folder,
                                   stdout=log, stderr=subprocess.STDOUT, env=cases.environment(RANKS="2", OMP_NUM_THREADS="1"))
        seen, deadline = {}, time.monotonic() + 800
        while process.poll() is None and time.monotonic() < deadline:
            for file in folder.glob("runs/nvme/**/*.swp"):
                try:
                    state = file.stat()
                except FileNotFoundError:                        # removed at the end
                    continue
                states = seen.setdefault(str(file.relative_to(folder)), [])
                if not states or states[-1] != (state.st_size, state.st_mtime_ns):
                    states.append((state.st_size, state.st_mtime_ns))
            time.sleep(0.05)
        process.kill()
        log.seek(0)
        text = log.read()
        assert process.wait() == 0, text[-3000:]
        known[key] = json.loads((folder / "record.json").read_text()), text, seen
        assert not list(folder.glob("runs/nvme/**/*.swp")), "files stay behind"
        return known[key]
    return run


def annotated(name):
    return CONFIGS / f"{name}_annotated.json"


def learns(record):
    assert record["measured"]["loss_nats_last"] < record["measured"]["loss_nats_first"]
    assert all(loss == loss for loss in record["details"]["loss"])


@pytest.mark.timeout(900)
def test_the_nvme_config_writes_and_reads_files(trained):
    record, text, seen = trained(annotated("zero3_nvme_offload"))
    learns(record)
    assert record["measured"]["loss_nats_last"] < record["measured"]["loss_nats_first"] - 2
    for folder in ("bfloat16params", "optimizer"):
        for rank in (0, 1):
            files = {file: states for file, states in seen.items() if f"/{folder}/rank{rank}/" in file}
            assert files and all(states[-1][0] >= 2**20 for states in files.values())
            assert any(len({when for _, when in states}) > 1 for states in files.values()), "none was written a second time"
    measured, predicted = record["measured"], record["predicted"]
    for key in ("parameter_nvme_bytes", "master_nvme_bytes", "optimizer_nvme_bytes", "gradient_nvme_bytes"):
        assert measured[key] == predicted[key] > 0
    assert len(record["details"]["files"]) > 6 and "swap files below runs/nvme/zero_stage_3" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cpu_config_trains_to_the_same_losses(trained):
    record, _, seen = trained(annotated("zero3_cpu_offload"))
    learns(record)
    assert not seen and not record["details"]["files"]
    other = trained(annotated("zero3_nvme_offload"))[0]["details"]["loss"]
    assert record["details"]["loss"] == pytest.approx(other, abs=5e-3)
    held = {key: value for key, value in record["measured"].items() if key in record["predicted"]}
    assert held == record["predicted"] and record["details"]["optimizer"] == "DeepSpeedCPUAdam"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_zenflow_trains_and_its_weights_are_transposed_until_repaired(trained, tmp_path_factory):
    config = deepspeed_config.read(annotated("zero2_zenflow"))
    interval = config["zero_optimization"].pop("zenflow")["update_interval"]
    plain = tmp_path_factory.mktemp("plain") / "plain.json"
    plain.write_text(json.dumps(config))
    as_is, repaired, without = (trained(*one)[0] for one in (
        (annotated("zero2_zenflow"),), (annotated("zero2_zenflow"), "repair_zenflow=True", "steps=4"), (plain, "steps=4")))
    for record in (as_is, repaired, without):
        learns(record)
        assert record["details"]["accumulation"] == interval
    assert as_is["details"]["optimizer"] == "ZenFlowCPUAdam" and "Parallel" in as_is["details"]["engine"]     # untested_optimizer false
    first = [record["measured"]["loss_nats_first"] for record in (as_is, repaired, without)]
    assert first[1] == pytest.approx(first[2], abs=1e-5)
    assert abs(first[0] - first[2]) > 5e-3, "ZenFlow no longer transposes weights: the note and the linter's rule can go"
    # what overlap_step and topk_ratio cost, by their notes: two buffers of 4 P/N, and moments of a tenth of the columns
    count = as_is["measured"]["parameters_count"]
    assert as_is["measured"]["other_bytes"] == pytest.approx(8 * count / 2 + 2 * 2 * 0.1 * count, rel=0.01)


BAD = [
    (["config=none.json"], ["there is no config file none.json"]),
    (["confg=none.json"], ["Did you mean config?"]), (["config="], ["config= names no file"]),
    (["steps=0"], ["steps=0 is too few"]), (["seq=1"], ["seq=1 is too few"]),
    (["repair_zenflow=True"], ["no zenflow section"]),
    (["config=a.json", {"zero_optimization": True}], ["an old form"]),
    (["config=a.json", {"optimizer": ...}], ["optimizer.type: not given"]),
    (["config=a.json", {"train_batch_size": 7}], ["train_batch_size", "7"]),
    (["config=a.json", {"zero_optimisation": {"stage": 2}}], ["zero_optimisation", "Did you mean \"zero_optimization\"?"]),
    (["config=a.json", {"bf16": {"enabled": False}, "fp16": {"enabled": True}}], ["fp16", "bf16"]),
    (["config=a.json", {"offload_param": {"device": "nvme", "nvme_path": "x", "buffer_size": 10**6, "max_in_cpu": 5}}], ["buffer_size", "1048576"]),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[words[0][:20] for _, words in BAD])
def test_bad_input_is_one_message(tmp_path, arguments, words):
    *settings, changes = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    config = deepspeed_config.read(annotated("zero3_cpu_offload"))
    for key, value in changes.items():
        (config["zero_optimization"] if key == "offload_param" else config)[key] = value
    (tmp_path / "a.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    done = subprocess.run([sys.executable, CONFIGS / "train.py", *settings], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env=cases.environment(RANKS="2"))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and all(word in done.stderr for word in words), done.stderr
    assert not os.listdir(tmp_path) or set(os.listdir(tmp_path)) == {"a.json"}
