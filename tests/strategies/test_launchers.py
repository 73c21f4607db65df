"""Every way to start the program: each trains, explains itself, and writes its record and nothing else."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.strategies import cases
from yardstick import ranks

slow = pytest.mark.slow
PROGRAM = str(cases.ROOT / "real_model_example.py")


def test_run_sh_from_another_directory(models, tmp_path):
    script = str(cases.ROOT / "strategies/3_zero_stage2/run.sh")
    ended = cases.command(["bash", script, *cases.toy(models["small"], "run")], cwd=tmp_path)
    record = cases.record(ended, tmp_path / "run")
    assert record["run"] == "strategies/3_zero_stage2" and record["machine"]["ranks"] == 2
    assert "zero2 on 2 CPU processes; batch: 8 sequences a step" in ended.stderr and "step 2/2" in ended.stderr
    assert record["command"].startswith("bash strategies/3_zero_stage2/run.sh model=")


def test_torchrun(models, tmp_path):
    ended = cases.command(["torchrun", "--nproc_per_node=2", f"--master_port={ranks.free_port()}", PROGRAM,
                           *cases.toy(models["small"], tmp_path / "run")])
    record = cases.record(ended, tmp_path / "run")
    assert record["machine"]["ranks"] == 2 and record["settings"]["strategy"] == "zero2"
    assert ended.stdout.count("Held by each rank") == 1            # one rank speaks
    assert ended.stderr.count("zero2 on 2 CPU processes") == 1


@slow
def test_run_sh_from_its_own_folder(models, tmp_path):
    ended = cases.command(["bash", "run.sh", *cases.toy(models["small"], tmp_path / "run")],
                          cwd=cases.ROOT / "strategies/2_zero_stage1", RANKS="3")
    record = cases.record(ended, tmp_path / "run")
    assert record["settings"]["strategy"] == "zero1" and record["machine"]["ranks"] == 3
    assert record["command"].startswith("RANKS=3 bash strategies/2_zero_stage1/run.sh ")


@slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_launcher_of_deepspeed(models, tmp_path, count):
    """It gives each process --local_rank=R as its first argument, and counts processes as GPUs."""
    ended = cases.command(["deepspeed", f"--num_gpus={count}", f"--master_port={ranks.free_port()}", PROGRAM,
                           *cases.toy(models["small"], tmp_path / "run")])
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert cases.record(ended, tmp_path / "run")["machine"]["ranks"] == count


def tree(folder):
    """{path: hash} of all files but those of Python's caches."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files that git has or would have, in a path with a space."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=cases.ROOT, capture_output=True,
                            text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    folder = tmp_path_factory.mktemp("a checkout")
    for name in listed.stdout.splitlines():
        if (cases.ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(cases.ROOT / name, folder / name)
    return folder


@slow
def test_a_run_changes_no_tracked_file(checkout):
    before = tree(checkout)
    ended = cases.command([sys.executable, "real_model_example.py", "strategy=dp", "model=tiny", "steps=2",
                           "seq=16", "micro_batch=1", "eval_batches=1", "sample_tokens=2",
                           "tensorboard=True"], cwd=checkout)
    assert ended.returncode == 0, ended.stderr[-4000:]
    added = {path: digest for path, digest in tree(checkout).items() if before.get(path) != digest}
    assert all(path.startswith("runs/") for path in added), added
    names = [path for path in added if path.startswith("runs/strategies/1_data_parallel/")]
    folder = checkout / os.path.dirname(next(path for path in names if path.endswith("record.json")))
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "record.json", "tensorboard"]
    assert f"record: {(folder / 'record.json').relative_to(checkout)}\n" in ended.stdout
    assert f"figure: {(folder / 'figure.png').relative_to(checkout)}\n" in ended.stdout
    assert "held-out text" in ended.stdout and "sample: 'def " in ended.stdout
    assert [path for path in names if "events.out.tfevents" in path]


@slow
def test_record_writes_results(checkout):
    before = tree(checkout)
    cases.model_folder(checkout / "runs" / "small", **cases.SMALL)
    ended = cases.command(["bash", "strategies/3_zero_stage2/run.sh", "record=cpu9", "model=runs/small", "steps=2",
                           "seq=16", "eval_batches=0", "sample_tokens=0"], cwd=checkout)
    assert ended.returncode == 0, ended.stderr[-4000:]
    added = {path for path, digest in tree(checkout).items() if before.get(path) != digest}
    path = "results/cpu9/strategies/3_zero_stage2.json"
    assert [name for name in added if not name.startswith("runs/")] == [path]
    assert f"record: {path}\n" in ended.stdout
    assert str(checkout) not in (checkout / path).read_text()


@contextlib.contextmanager
def training(strategy, model, folder):
    """A run that would take for ever, after its first step: (process, its log). Nothing of it is left behind."""
    words = ["bash", f"strategies/{cases.FOLDERS[strategy]}/run.sh", *cases.toy(model, folder / "run"),
             "steps=100000"]
    log = folder / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(words, cwd=cases.ROOT, env=cases.environment(), stdout=out, stderr=out,
                                   start_new_session=True)
    try:
        until = time.monotonic() + 120
        while "step 1/" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield process, log
        until = time.monotonic() + 10
        while members(process.pid):
            assert time.monotonic() < until, "ranks outlive the command"
            time.sleep(0.1)
    finally:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def members(group):
    """Living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@slow
def test_ctrl_c_ends_every_rank(models, tmp_path):
    with training("dp", models["small"], tmp_path) as (process, _):
        os.killpg(process.pid, signal.SIGINT)            # as a terminal does, to the whole foreground group
        assert process.wait(timeout=30) == 130


@slow
@pytest.mark.timeout(1800)
def test_a_killed_rank_ends_the_run_and_leaves_no_swap_files(models, tmp_path, async_io):
    with training("infinity", models["wide"], tmp_path) as (process, log):
        assert list((tmp_path / "run").rglob("*.swp"))
        psutil.Process(process.pid).children()[1].kill()
        assert process.wait(timeout=30) == 128 + signal.SIGKILL
    assert "rank 1 of 2 was ended by SIGKILL; ending the other rank" in log.read_text()
    assert not list((tmp_path / "run").rglob("*.swp"))


@slow
@pytest.mark.timeout(1800)
def test_torchrun_leaves_no_swap_files(models, tmp_path, async_io):
    """Here no process outlives the ranks that could remove them."""
    ended = cases.command(["torchrun", "--nproc_per_node=2", f"--master_port={ranks.free_port()}", PROGRAM,
                           "strategy=infinity", *cases.toy(models["wide"], tmp_path / "run")])
    written = cases.record(ended, tmp_path / "run")
    assert written["measured"]["nvme_bytes"] > 2**20 and not list((tmp_path / "run").rglob("*.swp"))


@pytest.mark.parametrize("strategy", ["dp", pytest.param("zero1", marks=slow), pytest.param("zero2", marks=slow),
                                      pytest.param("zero3", marks=slow), "offload"])
def test_no_compiler_is_needed(launch, models, tmp_path, strategy):
    """On a machine that has none; the server of these tests makes sure that nothing was compiled elsewhere."""
    out = launch(cases.counting, {"strategy": strategy, "model": models["small"], "precision": "fp32"},
                 environment={"PATH": str(tmp_path), "CXX": "", "CC": ""})
    assert len(out.good()) == 2 and "which needs no compiler; cpp_ops=True takes DeepSpeed's" in out.log
