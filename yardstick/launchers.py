"""What launchers tell a process: srun's words put into those of torchrun and deepspeed; contradictions are refused.

    launchers.adopt()              # first in a program: from then on `srun python program.py` starts ranks, as torchrun does
    launchers.check()              # before a group is made

torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun sets only its own variables. A
program typed in the shell of salloc or in a script of sbatch sees most of those too, and is no task: no step is its own.
"""

import os
import re
import socket
import sys

from yardstick.settings import SettingsError

FIRST_STEP_OF_SLURM = 2**32 - 16       # steps of srun count from 0; the shells of salloc and sbatch are from here on
PORTS = range(10000, 30000)            # below Linux's ephemeral ports, so that no connection of another program holds one


def adopt(environment=os.environ, say=lambda text: print(text, file=sys.stderr, flush=True)):
    """Set RANK and its like from srun's variables, where srun started this process as one of several tasks.

    What is set already stays: with RANK there, another launcher (torchrun inside srun) or a hand has spoken, and `say` is
    told where that contradicts srun. Raises SettingsError for variables that cannot be read.
    """
    if not is_task(environment):
        return
    told = of_task(environment)
    if "RANK" in environment:
        differs = [f"{key}={environment[key]}" for key in ("RANK", "WORLD_SIZE") if environment.get(key, told[key]) != told[key]]
        if differs and "TORCHELASTIC_RUN_ID" not in environment and "STARTED_BY" not in environment:
            say(f"note: this is task {told['RANK']} of srun's {told['WORLD_SIZE']}, and the environment says {', '.join(differs)}: the "
                "environment is followed. If no launcher inside srun has set it, unset RANK and WORLD_SIZE before srun.")
        return
    for key, value in told.items():
        environment.setdefault(key, value)


def is_task(environment):
    """True in a process that srun started as one of several tasks.

    >>> is_task({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"})
    True
    >>> is_task({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"})                                # a line of an sbatch script
    False
    >>> is_task({"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_NTASKS": "2"})   # a shell of salloc
    False
    >>> is_task({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2"})   # srun --pty bash
    False
    """
    step = environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID") or ""
    return ("SLURM_PROCID" in environment and step.isdecimal() and int(step) < FIRST_STEP_OF_SLURM
            and _first(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") not in ("", "1"))


def of_task(environment):
    """{RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT} of a task of srun.

    The ranks meet at the first host of the step's node list, where task 0 runs unless --distribution says otherwise, at a
    port that follows from the job and the step: steps beside each other on a node do not meet.

    >>> task = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "6", "SLURM_JOB_ID": "71",
    ...         "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    >>> " ".join(f"{key}={value}" for key, value in of_task(task).items())
    'RANK=5 WORLD_SIZE=6 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=gpu07 MASTER_PORT=10071'
    """
    rank = _number(environment, "SLURM_PROCID")
    world = _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    local = _number(environment, "SLURM_LOCALID")
    job, step = _number(environment, "SLURM_JOB_ID", "SLURM_JOBID"), _number(environment, "SLURM_STEP_ID", "SLURM_STEPID")
    names = _first(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    try:
        nodes = hosts(names)
        here = tasks_per_node(_first(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"))
    except ValueError as error:
        raise SettingsError(f"srun started this process, and {error}. Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT "
                            "before the program starts, or start it by torchrun.") from None
    node = _number(environment, "SLURM_NODEID") if "SLURM_NODEID" in environment else 0
    # --gpus-per-task and the like show each task one GPU, which is its number 0
    shown = environment.get("CUDA_VISIBLE_DEVICES", "")
    own_gpu = shown and "," not in shown and _own_gpu(environment)
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0" if own_gpu else str(local),
            "LOCAL_WORLD_SIZE": str(here[min(node, len(here) - 1)]), "MASTER_ADDR": nodes[0] if len(nodes) > 1 else "127.0.0.1",
            "MASTER_PORT": str(PORTS[(job + 1009 * step) % len(PORTS)])}


def check(environment=os.environ):
    """Raise SettingsError where a launcher, or a hand, has set only part of what a rank needs, or a port that is in use."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if key in environment and not environment[key].isdecimal():
            raise SettingsError(f"{key}={environment[key]} in the environment is no number. torchrun and deepspeed set it; unset it "
                                "to let this program start its ranks itself.")
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank >= world:
        raise SettingsError(f"RANK={rank} must be less than WORLD_SIZE={world}. Unset both to let this program start its ranks "
                            "itself, or use torchrun.")
    missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if world > 1 and key not in environment]
    if missing:
        raise SettingsError(f"RANK={rank} and WORLD_SIZE={world} are set, and {' and '.join(missing)} not: ranks cannot find each "
                            "other. Set what is missing, use torchrun, or unset RANK to let this program start its ranks.")
    port = environment.get("MASTER_PORT", "29500")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise SettingsError(f"MASTER_PORT={port} in the environment is no port. Give one from 1024 to 65535.")
    if rank == 0 and world > 1 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":     # else the agent listens there
        _check_port(int(port), environment["MASTER_ADDR"])


def _check_port(port, address):
    with socket.socket() as probe:                           # as torch's store binds it: every address of this machine
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise SettingsError(f"rank 0 cannot listen on port {port} of {address} (MASTER_PORT): {error.strerror}. Another run may have "
                                "it: wait for its end, or give another port, as MASTER_PORT= or to deepspeed as --master_port.") from None


def _own_gpu(environment):
    return any(environment.get(key) for key in ("SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND"))


def hosts(names):
    """The hosts of a Slurm node list, in order.

    >>> hosts("node[01-03,7]")
    ['node01', 'node02', 'node03', 'node7']
    >>> hosts("login,a[1-2]-ib[0,3],z9")
    ['login', 'a1-ib0', 'a1-ib3', 'a2-ib0', 'a2-ib3', 'z9']
    >>> hosts("node[1-")
    Traceback (most recent call last):
    ...
    ValueError: its node list 'node[1-' cannot be read
    """
    found = []
    if not re.fullmatch(r"[^,\[\]\s]*(\[[^\[\]\s]*\][^,\[\]\s]*)*(,[^,\[\]\s]+(\[[^\[\]\s]*\][^,\[\]\s]*)*)*", names) or not names:
        raise ValueError(f"its node list {names!r} cannot be read")
    for name in re.split(r",(?![^\[]*\])", names):
        parts = [""]
        for text, numbers in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", name):
            choices = [text] if text else [number for one in numbers.split(",") for number in _range(one, names)]
            parts = [part + choice for part in parts for choice in choices]
        found += parts
    return found


def _range(text, names):
    """"01-03" -> 01, 02, 03: as wide as the first number is written."""
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise ValueError(f"its node list {names!r} cannot be read")
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]


def tasks_per_node(text):
    """Tasks of each node.

    >>> tasks_per_node("8(x2),4")
    [8, 8, 4]
    """
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        raise ValueError(f"its tasks per node {text!r} cannot be read")
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def _first(environment, *names):
    return next((environment[name] for name in names if environment.get(name)), "")


def _number(environment, *names):
    text = _first(environment, *names)
    if not text.isdecimal():
        raise SettingsError(f"srun started this process, and {' or '.join(names)} in the environment is {text!r} and no number. Start the "
                            "program by srun itself, or by torchrun.")
    return int(text)
