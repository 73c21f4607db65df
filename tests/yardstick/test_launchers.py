"""Slurm's environment as srun, sbatch and salloc leave it: who is a rank, which one, and where ranks meet."""

import pytest

from yardstick import launchers
from yardstick.settings import SettingsError

# what each of 2 x 2 tasks has, but for its own numbers
STEP = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_JOB_NODELIST": "gpu[01-03]", "SLURM_STEP_NODELIST": "gpu[02-03]", "SLURM_TASKS_PER_NODE": "2(x3)",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
# the shell of an sbatch script has a PROCID, and no step
BATCH = {key: value for key, value in STEP.items() if "STEP" not in key} | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def task(rank, **changes):
    return {**STEP, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2), "SLURM_NODEID": str(rank // 2), **changes}


def adopted(environment):
    """(environment after adopt, what it said)."""
    said = []
    launchers.adopt(environment, said.append)
    return environment, said


def test_tasks_become_ranks():
    every = [adopted(task(rank))[0] for rank in range(4)]
    assert [e["RANK"] for e in every] == ["0", "1", "2", "3"]
    assert [e["LOCAL_RANK"] for e in every] == ["0", "1", "0", "1"]
    assert {e["WORLD_SIZE"] for e in every} == {"4"} and {e["LOCAL_WORLD_SIZE"] for e in every} == {"2"}
    assert {e["MASTER_ADDR"] for e in every} == {"gpu02"}                  # of the step, not of the job
    ports = {e["MASTER_PORT"] for e in every}
    assert len(ports) == 1 and 1024 < int(ports.pop()) < 32768


def test_steps_beside_each_other_meet_at_different_ports():
    ports = {launchers.of_task(task(0, SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)))["MASTER_PORT"]
             for job in (4711, 4712) for step in range(4)}
    assert len(ports) == 8


def test_one_node_needs_no_name():
    alone = task(1, SLURM_STEP_NODELIST="gpu02", SLURM_STEP_TASKS_PER_NODE="4", SLURM_LOCALID="1", SLURM_NODEID="0")
    assert adopted(alone)[0]["MASTER_ADDR"] == "127.0.0.1"


def test_a_task_that_sees_one_gpu_calls_it_0():
    bound = {"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_PER_TASK": "1"}
    assert launchers.of_task(task(1, **bound))["LOCAL_RANK"] == "0"
    assert launchers.of_task(task(1, **{**bound, "CUDA_VISIBLE_DEVICES": "0,1"}))["LOCAL_RANK"] == "1"
    assert launchers.of_task(task(1, CUDA_VISIBLE_DEVICES="0"))["LOCAL_RANK"] == "1"         # chosen by hand: refused later


@pytest.mark.parametrize("environment", [
    {}, BATCH, {**BATCH, "SLURM_STEP_ID": str(2**32 - 6)}, {**BATCH, "SLURM_STEP_ID": "-6"},
    task(0, SLURM_STEP_NUM_TASKS="1"), {key: value for key, value in task(0).items() if key != "SLURM_PROCID"},
], ids=["no Slurm", "script of sbatch", "shell of salloc", "shell of salloc, signed", "srun --pty bash", "no task"])
def test_what_is_no_task_stays_as_it_is(environment):
    before = dict(environment)
    assert adopted(environment) == (before, [])


def test_the_addresses_that_a_user_gives_are_kept():
    environment, _ = adopted(task(3, MASTER_ADDR="10.0.0.7", MASTER_PORT="29400"))
    assert (environment["RANK"], environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("3", "10.0.0.7", "29400")


def test_ranks_of_another_launcher_win():
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}       # srun starts one torchrun on each node
    environment, said = adopted(task(1, **torchrun))
    assert (environment["RANK"], environment["WORLD_SIZE"], said) == ("5", "8", [])
    environment, said = adopted(task(1, RANK="0", WORLD_SIZE="4"))                   # exported before srun
    assert environment["RANK"] == "0" and "LOCAL_RANK" not in environment
    assert len(said) == 1 and "task 1 of srun's 4" in said[0] and "says RANK=0:" in said[0] and "unset RANK" in said[0]
    assert not adopted(task(1, RANK="1", WORLD_SIZE="4"))[1]                         # the same, said twice


@pytest.mark.parametrize("changes, words", [
    ({"SLURM_STEP_NODELIST": "gpu[02-"}, "its node list 'gpu[02-' cannot be read"),
    ({"SLURM_STEP_NODELIST": "gpu[a-b]"}, "its node list 'gpu[a-b]' cannot be read"),
    ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "its tasks per node 'two' cannot be read"),
    ({"SLURM_LOCALID": ""}, "SLURM_LOCALID in the environment is '' and no number"),
])
def test_what_cannot_be_read_is_said(changes, words):
    with pytest.raises(SettingsError, match="srun started this process, and ") as caught:
        launchers.adopt(task(1, **changes))
    assert words in str(caught.value) and "\n" not in str(caught.value) and "torchrun" in str(caught.value)
