"""Every way to start the program: each trains, explains itself, and writes its record and nothing else."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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


def nodes(commands, seconds=240, cwd=cases.ROOT, started=None):
    """Run commands at once, each (words, changes of the environment), as the nodes of a cluster do: [CompletedProcess].

    started: called here with the processes once the first has told a step. None of them outlives this.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(os.path.join(folder, f"{k}{name}"), "w+")) for k in range(len(commands)) for name in "oe"]
        processes = [subprocess.Popen(words, cwd=cwd, env=cases.environment(**changes), stdout=out, stderr=err, start_new_session=True)
                     for (words, changes), out, err in zip(commands, files[::2], files[1::2])]
        try:
            until = time.monotonic() + seconds
            while started and "step 1/" not in (said := open(files[1].name).read()):
                assert processes[0].poll() is None and time.monotonic() < until, said[-4000:]
                time.sleep(0.1)
            if started:
                started(processes)
            codes = [process.wait(timeout=max(1.0, until - time.monotonic())) for process in processes]
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        texts = [open(file.name).read() for file in files]
    return [subprocess.CompletedProcess(words, code, out, err)
            for (words, _), code, out, err in zip(commands, codes, texts[::2], texts[1::2])]


def one_run(ended, folder, world):
    """The record of a run over nodes: written once, by rank 0, which alone speaks."""
    assert all(node.returncode == 0 for node in ended), "\n".join(node.stderr[-3000:] for node in ended)
    written = cases.record(ended[0], folder)
    assert written["machine"]["ranks"] == world
    assert not any("Held by each rank" in node.stdout or "record:" in node.stdout for node in ended[1:])
    return written


def torchrun(node, port, *arguments):
    return (["torchrun", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}",
             "real_model_example.py", *arguments], {})


@slow
def test_two_nodes_by_torchrun(checkout):
    """Without output=: each node makes a name of its own for the run, and rank 0's is taken; resume=auto finds it."""
    model = cases.model_folder(checkout / "runs" / "small", **cases.SMALL)
    words = [word for word in cases.toy(model, "") if not word.startswith("output")] + ["strategy=zero2", "save_every=1"]
    home, port = checkout / "runs" / "strategies" / "3_zero_stage2", ranks.free_port()
    shutil.rmtree(home, ignore_errors=True)
    first = nodes([torchrun(node, port, *words) for node in (0, 1)], cwd=checkout)
    assert [node.returncode for node in first] == [0, 0], first[0].stderr[-4000:] + first[1].stderr[-4000:]
    [folder] = home.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "figure.png", "record.json"]
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000002\n"
    before = json.loads((folder / "record.json").read_text())["details"]["loss"]
    second = nodes([torchrun(node, port, *words, "steps=4", "resume=auto") for node in (0, 1)], cwd=checkout)
    assert [node.returncode for node in second] == [0, 0], second[0].stderr[-4000:] + second[1].stderr[-4000:]
    assert [path.name for path in home.iterdir()] == [folder.name]
    record = json.loads((folder / "record.json").read_text())
    assert record["details"]["loss"][:2] == before and len(record["details"]["loss"]) == 4 and record["machine"]["ranks"] == 2
    assert "going on after step 2" in second[0].stderr and (folder / "checkpoints" / "latest").read_text() == "step_00000004\n"


def hostfile(folder, text):
    (folder / "hosts").write_text(text)
    return ["deepspeed", "--hostfile", str(folder / "hosts"), "--master_addr", "127.0.0.1"]


@slow
def test_two_nodes_by_deepspeed(models, tmp_path):
    """Two names of this machine, one rank on the first and two on the second, started without ssh."""
    launcher = hostfile(tmp_path, "localhost slots=1\n127.0.0.1 slots=2\n")

    def both(*arguments):
        words = [*cases.toy(models["small"], tmp_path / "run"), "strategy=zero3", "save_every=2", *arguments]
        port = str(ranks.free_port())
        return nodes([([*launcher, "--no_ssh", "--node_rank", str(k), "--master_port", port, PROGRAM, *words], {}) for k in (0, 1)])
    first = one_run(both(), tmp_path / "run", 3)
    again = both("steps=4", "resume=auto")
    second = one_run(again, tmp_path / "run", 3)
    assert second["details"]["loss"][:2] == first["details"]["loss"] and len(second["details"]["loss"]) == 4
    assert "going on after step 2" in again[0].stderr and not list(tmp_path.glob("run/*/.*"))


@slow
def test_a_hostfile_of_one_host(models, tmp_path):
    """As it stands, DeepSpeed wants to reach even this machine by ssh."""
    words = [*hostfile(tmp_path, "localhost slots=2\n"), "--no_ssh_check", "--master_port", str(ranks.free_port()), PROGRAM]
    ended = cases.command([*words, *cases.toy(models["small"], tmp_path / "run")])
    assert one_run([ended], tmp_path / "run", 2)["settings"]["strategy"] == "zero2"


def srun(rank, world, arguments, **changes):
    """What one of `world` tasks of srun has, each on a node of its own; both nodes are this machine."""
    return ([sys.executable, PROGRAM, *arguments],
            {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "3", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank),
             "SLURM_NTASKS": str(world), "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_NODELIST": "localhost,127.0.0.1", **changes})


def test_srun(models, tmp_path):
    words = cases.toy(models["small"], tmp_path / "run")
    record = one_run(nodes([srun(rank, 2, words) for rank in (0, 1)]), tmp_path / "run", 2)
    assert record["command"].startswith("RANKS=2 bash strategies/3_zero_stage2/run.sh ")


@slow
def test_scancel_saves_and_srun_resumes(models, tmp_path):
    """scancel, and --signal=TERM@ before the time is up, send SIGTERM to every task."""
    def run(*arguments, started=None):
        words = [*cases.toy(models["small"], tmp_path / "run"), "strategy=zero1", *arguments]
        return nodes([srun(rank, 2, words) for rank in (0, 1)], started=started)
    stopped = run("steps=100000", started=lambda tasks: [task.terminate() for task in tasks])
    assert [task.returncode for task in stopped] == [128 + signal.SIGTERM] * 2, stopped[0].stderr[-4000:]
    done = int(stopped[0].stderr.partition("stopped after step ")[2].split()[0])
    again = run(f"steps={done + 2}", "resume=auto")
    assert f"going on after step {done}" in again[0].stderr
    assert len(one_run(again, tmp_path / "run", 2)["details"]["loss"]) == done + 2


@slow
def test_a_killed_task_ends_the_others(models, tmp_path):
    words = [*cases.toy(models["small"], tmp_path / "run"), "steps=100000"]
    killed = []

    def kill(tasks):
        tasks[1].kill()
        killed.append(time.monotonic())
    survivor, _ = nodes([srun(rank, 2, words) for rank in (0, 1)], started=kill)
    assert survivor.returncode not in (0, None) and time.monotonic() - killed[0] < 60
    assert "[rank0]" in survivor.stderr and "onnection" in survivor.stderr       # gloo: reset, or closed, by peer
    assert not (tmp_path / "run" / "record.json").exists()


@slow
def test_a_task_that_never_comes(models, tmp_path):
    words = [*cases.toy(models["small"], tmp_path / "run"), "timeout_seconds=5"]
    for rank, ended in enumerate(nodes([srun(rank, 3, words) for rank in (0, 1)])):
        assert ended.returncode == 1 and "Traceback" not in ended.stderr
        assert f"[rank {rank}/3] the 3 ranks did not all meet at localhost:" in ended.stderr


@pytest.mark.parametrize("changes, words", [
    ({"SLURM_PROCID": "2"}, ["RANK=2 must be less than WORLD_SIZE=2"]),
    ({"SLURM_NODELIST": "gpu[1-"}, ["srun started this process", "'gpu[1-' cannot be read", "torchrun"]),
    ({"MASTER_PORT": "http"}, ["MASTER_PORT=http", "no port"]),
    ({"MASTER_PORT": "taken"}, ["rank 0 cannot listen on port", "of localhost", "Address already in use", "--master_port"]),
])
def test_what_srun_says_is_checked_first(changes, words, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        if changes.get("MASTER_PORT") == "taken":
            changes = {"MASTER_PORT": str(other.getsockname()[1])}
        [ended] = nodes([srun(0, 2, [f"output={tmp_path / 'run'}"], **changes)])
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1
    assert all(word in ended.stderr for word in words), ended.stderr
    assert not (tmp_path / "run").exists()


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
