"""The pipeline on real ranks: the gradients of one process, the delays of the simulator, and an end to every fault."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pipedream.messages import check_order
from pipedream.pipedream_simple import FLUSHING, cut, one_f_one_b
from yardstick.results import ROOT
from yardstick.schedules import Op, build

ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def pipelines(tmp_path, ranks, settings):
    """[what each run measured], all on one start of the ranks."""
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(settings))
    done = subprocess.run([sys.executable, "tests/pipedream/pipelines.py", str(ranks), str(path)], cwd=ROOT, capture_output=True, text=True,
                          timeout=600, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(path.read_text())


def legal(ranks):
    """Settings of every flushing schedule that this number of ranks allows."""
    found = []
    for mode in ("flush", "gpipe", *FLUSHING):
        for chunks in (2, 4) if mode in ("interleaved_1f1b", "interleaved_zero_bubble", "hanayo") else (None,):
            if ranks * (chunks or 1) > 8:
                continue
            try:
                build("1f1b" if mode == "flush" else mode, ranks, 2 * ranks, chunks)
            except ValueError:
                continue
            found.append({"mode": mode, "micro_batches": 2 * ranks, "chunks": chunks})
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_every_schedule_that_flushes_trains_as_one_process(tmp_path, ranks):
    settings = legal(ranks)
    assert {one["mode"] for one in settings} >= {"flush", "gpipe", "interleaved_1f1b", "zb_h1", "zb_h2", "zb_v", "dualpipe_v", "hanayo"}
    assert ranks % 2 or {one["mode"] for one in settings} >= {"dualpipe", "chimera"}
    for one, measured in zip(settings, pipelines(tmp_path, ranks, settings)):
        assert measured["weights_apart_ratio_max"] < 1e-12 and measured["losses_apart_nats_max"] < 1e-12, (one, measured)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_asynchronous_modes_equal_one_process_with_their_delays_in_every_bit(tmp_path, ranks):
    modes = ["stash", "naive", "vertical_sync", "2bw"]
    settings = [{"mode": mode, "micro_batches": 2 * ranks, "dtype": dtype} for mode in modes for dtype in ("float64", "float32")]
    found = pipelines(tmp_path, ranks, settings)
    for one, measured in zip(settings, found):
        assert measured["weights_apart_ratio_max"] == 0 and measured["losses_apart_nats_max"] == 0, (one, measured)
    versions = {one["mode"]: measured["versions_count"] for one, measured in zip(settings, found)}
    assert versions == {"stash": ranks, "naive": 1, "vertical_sync": ranks, "2bw": 2}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("replicas", ["3,1", "2,1,1", "1,3"])
def test_replicated_stages(tmp_path, replicas):
    settings = [{"mode": mode, "replicas": replicas, "micro_batches": 6} for mode in ("stash", "naive", "vertical_sync", "flush")]
    for one, measured in zip(settings, pipelines(tmp_path, 4, settings)):
        assert measured["weights_apart_ratio_max"] < 1e-15 and measured["losses_apart_nats_max"] < 1e-12, (one, measured)


def test_its_own_1f1b_is_that_of_the_schedules():
    for stages in range(1, 9):
        for micro_batches in (1, 2, 5, 8, 12):
            schedule = build("1f1b", stages, micro_batches)
            assert [one_f_one_b(stages, micro_batches, stage) for stage in range(stages)] == schedule


def test_the_order_of_messages_is_checked():
    for name in ("1f1b", "zb_v", "dualpipe_v", "hanayo", "chimera"):
        check_order(build(name, 4, 8))
    with pytest.raises(ValueError, match="message 6 from rank 0 to rank 1 is the output of part 0 for micro-batch 6, and the receive"):
        check_order(build("zb_v", 4, 8), posts="need")            # receives in the order of need: wrong without tags
    wrong = build("gpipe", 2, 2)
    wrong[1] = [Op("F", 1), Op("F", 0), Op("B", 0), Op("B", 1)]
    with pytest.raises(ValueError, match="post receives in the order of sending"):
        check_order(wrong, posts="need")


@pytest.mark.parametrize("parts", (1, 2, 3, 5))
def test_every_layer_is_in_one_part(parts):
    layers = list(range(7))                                    # an embedding, five blocks, a head
    found = cut(layers, parts)
    assert len(found) == parts and [layer for part in found for layer in part] == layers


def test_a_run_that_diverges_is_recorded_as_that(tmp_path):
    path = tmp_path / "runs.json"
    path.write_text(json.dumps([{"mode": "flush", "learning_rate": 1e4, "steps": 12, "micro_batches": 2, "dtype": "float32", "check": False}]))
    done = subprocess.run([sys.executable, "tests/pipedream/pipelines.py", "2", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "0" / "record.json").read_text())
    assert record["outcome"] == "diverged" and "loss_nats_last" not in record["measured"] and None in record["details"]["loss"]


def start(*settings, ranks="2", **options):
    return subprocess.Popen([sys.executable, "pipedream/pipedream_simple.py", *settings], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env={**ENVIRONMENT, "RANKS": ranks}, **options)


@pytest.mark.timeout(300)
def test_a_killed_rank_ends_the_others_and_is_named(tmp_path):
    job = start("steps=1000", "pad_seconds=0.02", "layers=2", "hidden=16", "heads=2", "seq=16", "check=False", f"output={tmp_path}")
    deadline = time.monotonic() + 120
    for line in job.stdout:
        if "micro-batch" in line or time.monotonic() > deadline:
            break
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    begun = time.monotonic()
    said = job.stdout.read()
    assert job.wait(60) == 128 + signal.SIGKILL and time.monotonic() - begun < 30
    assert "rank 1 of 2 was ended by SIGKILL" in said


@pytest.mark.parametrize("settings, ranks, says", [
    (["layers=1"], "2", "2 model parts need as many layers"), (["micro_batches=0"], "2", "micro_batches=0 must be above zero"),
    (["mode=stsh"], "2", "Did you mean mode=stash?"), (["replicas=3,1"], "2", "need 4 ranks, and there are 2. Set RANKS=4"),
    (["replicas=3,x"], "4", "whole numbers from 1"), (["replicas=3,1", "micro_batches=8"], "4", "must be a multiple of the replicas"),
    (["mode=chimera"], "3", "an even number of stages"), (["mode=2bw", "micro_batches=1"], "2", "at least the stages"), (["heads=3"], "2", "heads=3 does not divide"),
    (["mode=zb_h1", "replicas=1,1"], "2", "takes no replicas"), (["stepz=3"], "2", "Did you mean steps?"),
])
def test_bad_settings_are_one_message(settings, ranks, says):
    job = start(*settings, ranks=ranks)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 1 and says in said and len(said.splitlines()) == 1, said
