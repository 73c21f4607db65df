"""Ranks that are killed, hang or go wrong end the run in time, named, and cost no checkpoint."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from strategies import checkpoints, resuming
from tests.strategies import cases
from tests.strategies.test_checkpoints import settings, training

slow = pytest.mark.slow
SECONDS = 60                          # from the fault to the end of the run


def disturbed(changes, point, action, rank=1, step=4):
    """Ranks of the program, of which one meets `action` at `point` of a step (counted from 1)."""
    plan = cases.plan(**changes)

    def act():
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(3600)                                 # hang

    def of_rank():
        import real_model_example
        from yardstick import probe
        here = os.environ["RANK"] == str(rank)
        enter = probe.Probe._phase

        @contextlib.contextmanager
        def phase(self, name, number=None):
            with enter(self, name, number):
                if here and name == point and self.of_run + 1 == step:
                    act()
                yield
        probe.Probe._phase = phase
        write, replace = checkpoints.Checkpoints._write, os.replace
        steps = []

        def interrupted(self, part):
            steps.append(part.name)
            if here and point == "save" and part.name == f".saving_step_{step:08d}":
                (part / "deepspeed").mkdir(exist_ok=True)
                (part / "deepspeed" / "half").write_bytes(b"0" * 1000)
                act()
            write(self, part)
        checkpoints.Checkpoints._write = interrupted
        if here and point == "latest":                   # after the rename, before the pointer
            os.replace = lambda a, b: act() if str(b).endswith("latest") and steps[-1] == f".saving_step_{step:08d}" else replace(a, b)
        if here and point == "rename":
            checkpoints.seal = _before(checkpoints.seal, lambda manifest: manifest["step"] == step and act())
        if here and point == "swap":
            from deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper import PartitionedOptimizerSwapper as Swapper
            calls = []
            Swapper.swap_in_optimizer_state = _before(Swapper.swap_in_optimizer_state,
                                                      lambda *a, **k: calls.append(0) or len(calls) == 12 and act())
        return real_model_example.train(plan, finish=False)["loss"]
    return of_rank


def _before(function, look):
    def both(*args, **kwargs):
        look(*args, **kwargs)
        return function(*args, **kwargs)
    return both


POINTS = ("forward", "backward", "step", "save")
# every pair; three of them, at another point each, among the quick tests
QUICK = {("zero2", "save"), ("zero3", "forward"), ("infinity", "swap")}
KILLS = [pytest.param(strategy, point, marks=[] if (strategy, point) in QUICK else slow)
         for strategy in cases.ORDER for point in POINTS + (("swap",) if strategy == "infinity" else ())]


@pytest.mark.parametrize("strategy,point", KILLS)
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(request, launch, models, tmp_path, strategy, point):
    if strategy == "infinity":
        request.getfixturevalue("async_io")
    run = settings(strategy, models, tmp_path / "run", save_every=2)
    out = launch(disturbed, run, point, "kill", seconds=120)
    assert out.code == 128 + signal.SIGKILL and out.seconds < SECONDS
    assert "rank 1 of 2 was ended by SIGKILL; ending the other rank" in out.log
    done = checkpoints.steps_in(tmp_path / "run" / "checkpoints")
    assert [path.name for path in done] == ["step_00000002"] and resuming.read(done[0])["step"] == 2
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002\n"
    if point not in ("save", "swap"):
        return                                           # nothing is left behind that those two do not leave
    resumed = launch(training, {"strategy": strategy, "resume": "auto", "output": run["output"]}).good()
    assert len(resumed[0][0]) == 6
    assert [path.name for path in checkpoints.steps_in(tmp_path / "run" / "checkpoints")] == [
        f"step_{step:08d}" for step in (2, 4, 6)]
    assert not list((tmp_path / "run" / "checkpoints").glob(".saving*"))


@pytest.mark.parametrize("point,newest", [("rename", 2), ("latest", 4)])
def test_a_kill_around_the_rename(launch, models, tmp_path, point, newest):
    """Rank 0 writes the manifest, renames, and writes `latest`: whatever it was doing, a whole checkpoint is there."""
    out = launch(disturbed, settings("zero2", models, tmp_path / "run", save_every=2), point, "kill", 0, seconds=120)
    assert out.code == 128 + signal.SIGKILL and "rank 0 of 2 was ended by SIGKILL" in out.log
    done = checkpoints.steps_in(tmp_path / "run" / "checkpoints")
    assert resuming.read(done[-1])["step"] == newest
    named = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    assert named in [path.name for path in done]


HANGS = [pytest.param(strategy, point, marks=[] if (strategy, point) == ("zero3", "forward") else slow)
         for strategy, point in (("dp", "forward"), ("zero1", "backward"), ("zero2", "step"), ("zero3", "forward"),
                                 ("offload", "step"), ("infinity", "forward"))]


@pytest.mark.parametrize("strategy,point", HANGS)
def test_a_hanging_rank_ends_the_run_with_every_stack(request, launch, models, tmp_path, strategy, point):
    if strategy == "infinity":
        request.getfixturevalue("async_io")
    run = settings(strategy, models, tmp_path / "run", save_every=2, timeout_seconds=8.0)
    out = launch(disturbed, run, point, "hang", seconds=120)
    assert out.code not in (0, None) and out.seconds < SECONDS
    assert "[rank 1/2] " in out.log and f"hangs, in {point} of step 4: it has not moved for 8 s" in out.log
    assert "waits for other ranks in " in out.log and "time.sleep(3600)" in out.log           # its stack, and the others'
    assert out.log.count("thread MainThread:") == 2
    assert "no rank has moved for too long (timeout_seconds=): rank 1 of 2 hung" in out.log
    assert [path.name for path in checkpoints.steps_in(tmp_path / "run" / "checkpoints")] == ["step_00000002"]


@slow
def test_a_stopped_rank_is_named(launch, models, tmp_path):
    """It cannot print a stack; the others can, and it is named all the same."""
    run = settings("zero2", models, tmp_path / "run", timeout_seconds=6.0)
    out = launch(disturbed, run, "forward", "stop", seconds=120)
    assert out.code not in (0, None) and out.seconds < SECONDS
    assert "[rank 0/2] " in out.log and "waits for other ranks in " in out.log
    assert "rank 1 of 2 hung" in out.log


def holding_the_lock():
    """A rank stands in C code that keeps Python's lock: no Python thread can speak."""
    from yardstick import ranks, watchdog
    ranks.GRACE_SECONDS, watchdog.SLACK_SECONDS = 10, 4

    def rank():
        import ctypes

        from yardstick.ranks import Rank
        watchdog.Watchdog(Rank(int(os.environ["RANK"]), 2, 0, "cpu"), 2).start()
        if os.environ["RANK"] == "1":
            ctypes.PyDLL(None).sleep(600)
        time.sleep(600)
    return rank


def test_a_rank_that_keeps_pythons_lock(launch):
    out = launch(holding_the_lock, seconds=60)
    assert out.code not in (0, None) and out.seconds < 30
    assert "Timeout (0:00:" in out.log and "test_faults.py" in out.log and "ranks 0, 1 of 2 hung" in out.log


# Numbers that are none

def poisoned(changes, what, rank=1, step=3):
    """Ranks of which one has a loss, or a gradient alone, that is not a number at one step."""
    plan = cases.plan(**changes)

    def of_rank():
        import deepspeed

        import real_model_example
        initialize, seen = deepspeed.initialize, {}
        here = os.environ["RANK"] == str(rank)

        def initialized(*args, **kwargs):
            engine, *rest = initialize(*args, **kwargs)
            seen["engine"], forward = engine, engine.module.forward
            calls = []

            def bad_loss(*args, **kwargs):
                out = forward(*args, **kwargs)
                calls.append(0)
                if here and what == "loss" and len(calls) == step:
                    out.loss = out.loss * float("nan")
                return out
            engine.module.forward = bad_loss
            last = list(engine.module.parameters())[-1]
            last.register_hook(lambda g: g * float("inf") if here and what == "gradient" and len(calls) == step else g)
            return engine, *rest
        deepspeed.initialize = initialized
        result = real_model_example.train(plan, finish=False)
        weights = all(bool(p.data.isfinite().all()) for p in seen["engine"].module.parameters())
        return result["loss"], seen["engine"].skipped_steps, weights
    return of_rank


@pytest.mark.parametrize("strategy,precision,what", [
    ("dp", "fp32", "loss"), ("zero2", "bf16", "gradient"), *(pytest.param(*case, marks=slow) for case in (
        ("dp", "fp32", "gradient"), ("dp", "bf16", "loss"), ("zero1", "fp32", "gradient"), ("zero2", "bf16", "loss"),
        ("zero3", "fp32", "gradient"), ("zero3", "fp32", "loss"), ("offload", "bf16", "gradient"), ("infinity", "bf16", "gradient")))])
def test_what_is_not_finite_is_said_and_skipped(request, launch, models, tmp_path, strategy, precision, what):
    if strategy == "infinity":
        request.getfixturevalue("async_io")
    run = settings(strategy, models, tmp_path / "run", precision=precision, save_every=0, micro_batch=3)
    out = launch(poisoned, run, what)
    for losses, skipped, finite in out.good():
        assert skipped == 1 and finite and len(losses) == 6
        assert [step for step, loss in enumerate(losses, 1) if loss != loss] == ([3] if what == "loss" else [])
    words = "step 3: the loss of rank 1 is nan" if what == "loss" else "step 3: the gradient of rank 1 is not finite"
    assert words in out.log and out.log.count("this update is skipped on every rank") == 1


def diverged(changes):
    from strategies import control
    control.LIMIT = 3

    def prepared():
        import torch
        plan = cases.plan(**changes)

        def rank():
            import real_model_example
            from strategies import models as builder
            build = builder.build

            def bad(plan):
                model = build(plan)
                with torch.no_grad():
                    next(model.parameters())[0, 0] = float("nan")
                return model
            builder.build = bad
            return real_model_example.train(plan, finish=False)
        return rank
    return prepared()


def test_a_checkpoint_waits_for_an_update(launch, models, tmp_path):
    """One step is skipped, at which one was due: it is saved after the next, and none is lost."""
    run = settings("dp", models, tmp_path / "run", save_every=3, steps=5, precision="fp32", micro_batch=3)
    launch(poisoned, run, "gradient").good()
    assert [path.name for path in checkpoints.steps_in(tmp_path / "run" / "checkpoints")] == ["step_00000004", "step_00000005"]


def test_a_run_that_only_skips_ends(launch, models, tmp_path):
    out = launch(diverged, settings("dp", models, tmp_path / "run", save_every=1))
    assert out.code == 1 and out.log.count("3 updates in a row were skipped, the last at step 3") == 1
    assert not checkpoints.steps_in(tmp_path / "run" / "checkpoints")    # weights that lead nowhere are not saved


# Disks

@pytest.fixture
def disk(tmp_path):
    """disk(bytes) -> a folder on a file system of that size."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("to mount a disk needs root on Linux")
    mounted = []

    def of(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("this machine does not allow mounts")
        mounted.append(folder)
        return folder
    yield of
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def filling(changes, folder, leave):
    """Ranks of which rank 0 fills the disk after the second step, to `leave` bytes."""
    plan = cases.plan(**changes)

    def rank():
        import real_model_example

        def look(engine, step):
            if step == 2 and os.environ["RANK"] == "0":
                fill(folder, leave)
        return real_model_example.train(plan, look, finish=False)["loss"]
    return rank


def fill(folder, leave):
    with open(os.path.join(folder, "ballast"), "wb") as file:
        file.write(b"0" * (shutil.disk_usage(folder).free - leave))


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(launch, models, tmp_path, disk):
    folder = disk(16_000_000)
    run = settings("zero2", models, folder / "run", save_every=2, keep=1)
    out = launch(filling, run, str(folder), 100_000)
    assert out.code == 1 and out.seconds < SECONDS
    assert "the checkpoint after step 4 could not be written" in out.log and " MB free, " in out.log
    assert "step_00000002 before it is whole" in out.log and "Traceback" not in out.log.split("could not be written")[0]
    done = checkpoints.steps_in(folder / "run" / "checkpoints")
    assert [path.name for path in done] == ["step_00000002"] and resuming.read(done[0])
    (folder / "ballast").unlink()
    assert len(launch(training, {"strategy": "zero2", "resume": "auto", "output": run["output"]}).good()[0][0]) == 6


def swapping(changes, folder):
    """Ranks of the NVMe strategy; the disk fills up once DeepSpeed has started, before its files are complete."""
    plan = cases.plan(**changes)

    def rank():
        import deepspeed

        import real_model_example
        initialize = deepspeed.initialize

        def initialized(*args, **kwargs):
            made = initialize(*args, **kwargs)
            if os.environ["RANK"] == "0":
                fill(folder, 1_000_000)
            deepspeed.comm.barrier()
            return made
        deepspeed.initialize = initialized
        return real_model_example.train(plan, finish=False)["loss"]
    return rank


def test_a_full_nvme_disk_is_foreseen(async_io, launch, models, tmp_path, disk):
    folder = disk(200_000_000)
    run = settings("infinity", models, tmp_path / "run", save_every=0, nvme_path=str(folder))
    out = launch(swapping, run, str(folder))
    assert out.code == 1 and out.seconds < SECONDS                       # and not 134, an abort in C
    assert "is filling up: at the start this rank's swap files still need" in out.log and "nvme_path=" in out.log


@pytest.mark.parametrize("extra,words", [("strategy=infinity", "a swap file takes"), ("save_every=1", "a file of a checkpoint takes")])
def test_files_that_the_shell_limits(async_io, models, tmp_path, extra, words):
    command = shlex.join([sys.executable, "real_model_example.py", extra, f"model={models['wide']}", f"output={tmp_path / 'run'}"])
    ended = cases.command(["bash", "-c", f"ulimit -f 1000; exec {command}"])
    assert ended.returncode == 1 and words in ended.stderr and "this shell allows files of 1" in ended.stderr
    assert "ulimit -f unlimited" in ended.stderr
