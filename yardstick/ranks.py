"""Ranks: how many, on which device, started from one command, and ended together when one of them fails.

`start` runs a function as n ranks of this machine. With no GPU it forks, so that the slow imports are paid
once; with GPUs it starts the same command again for each rank, because a forked process cannot use CUDA.
A process that already has RANK in its environment (torchrun, deepspeed, srun) is a rank and joins its group.
"""

import ctypes
import mmap
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from yardstick import watchdog

ROOT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 10     # what surviving ranks get to notice a dead one before they are ended


@dataclass(frozen=True)
class Rank:
    """This process: its number, the number of ranks, its number on this machine, its device."""

    rank: int
    world: int
    local_rank: int
    device: str            # "cpu" or "cuda:k"

    @property
    def gpu(self):
        return self.device != "cpu"


def gpu_count():
    """GPUs that torch may use here. Asks NVML, so that CUDA is not initialised in this process."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch
    return torch.cuda.device_count() if torch.version.cuda and torch.cuda.is_available() else 0


def gpu_name():
    """The name of the first GPU as CUDA gives it, or "none"."""
    import torch
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"


def is_rank():
    """True in a process that a launcher started as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def default_world():
    """RANKS where set, else every GPU, else 2 processes on the CPU."""
    text = os.environ.get("RANKS")
    if text is None:
        return gpu_count() or 2
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"RANKS={text} is not a number of ranks. Give RANKS=2, for example.")
    gpus = gpu_count()
    if gpus and int(text) > gpus:
        raise ValueError(f"RANKS={text} but this machine has {gpus} GPU{'s' if gpus > 1 else ''}. Give RANKS={gpus}, "
                         "or DS_ACCELERATOR=cpu to run on the CPU.")
    return int(text)


def use_cpu_accelerator():
    """Tell DeepSpeed to train on the CPU, before it is imported: it asks for gloo and no CUDA then."""
    os.environ["DS_ACCELERATOR"] = "cpu"


def cores():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor():
    """What tells processors apart for compiled code: machine and instruction sets."""
    flags = platform.processor()
    if Path("/proc/cpuinfo").exists():
        with open("/proc/cpuinfo") as lines:
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), flags)
    return f"{platform.machine()} {flags}"


_stop = []             # signals that asked this rank to stop after the step under way


def listen():
    """Take Ctrl-C, SIGTERM and `start`'s own request as a wish to stop after this step, from now on: `stop_requested`.

    torchrun and Slurm send SIGTERM, Slurm to every process of a task, and wait before they kill. A rank of `start` ignores
    the terminal's Ctrl-C, as the one who started it passes it on. Under a launcher a second Ctrl-C, two seconds or more after
    the first, ends the process at once.
    """
    def asked(number, _):
        if number == signal.SIGINT and _stop and time.monotonic() - _stop[0][1] > 2:
            raise KeyboardInterrupt
        _stop.append((number, time.monotonic()))
    signal.signal(signal.SIGUSR1, asked)
    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, signal.SIG_IGN if "STARTED_BY" in os.environ else asked)


def stop_requested():
    """The signal that asked this rank to stop, or None."""
    return _stop[0][0] if _stop else None


def stop_code():
    """The exit code of a rank that stopped because it, or another, was asked to: 128 + the signal's number."""
    started_here = "STARTED_BY" in os.environ                # `start` knows the signal
    return 0 if started_here else 128 + (stop_requested() or signal.SIGINT)


def free_port():
    """A TCP port nobody listens on at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(gpu, seconds=600, deepspeed=True):
    """Join the process group named by the environment and return this process's Rank.

    seconds: how long a collective waits for the other ranks before it raises. deepspeed: by DeepSpeed, which then uses it.
    """
    import datetime

    import torch
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    device = f"cuda:{local}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(local)
    elif "OMP_NUM_THREADS" not in os.environ:            # the cores, shared out among the ranks of this machine
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
        torch.set_num_threads(max(1, cores() // here))
    os.environ.setdefault("LOCAL_RANK", str(local))          # without it DeepSpeed looks for MPI
    if world == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    timeout = datetime.timedelta(seconds=seconds + GRACE_SECONDS)    # a Watchdog of `seconds` speaks first
    make_group = torch.distributed.new_group

    def new_group(*args, **kwargs):                          # DeepSpeed makes groups without a timeout: torch's is 30 minutes
        return make_group(*args, **(kwargs if len(args) > 1 else {"timeout": timeout, **kwargs}))
    torch.distributed.new_group = new_group
    backend = "nccl" if gpu else "gloo"
    try:
        if deepspeed:
            from deepspeed import init_distributed
            init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
        else:
            torch.distributed.init_process_group(backend, timeout=timeout)
    except torch.distributed.DistError as error:             # some did not come, or not to this address
        raise SystemExit(f"[rank {rank}/{world}] the {world} ranks did not all meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                         f"within {timeout.seconds} s: {str(error).splitlines()[0].rstrip('.')}. Start as many processes as WORLD_SIZE says, all "
                         "with that MASTER_ADDR and MASTER_PORT, which every machine must reach.") from None
    return Rank(rank, world, local, device)


def _environment(rank, world, port):
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "STARTED_BY": "yardstick.ranks"}


def end_with(parent):
    """End this process when the one that started it, whose id is `parent`, ends, however that happens (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)       # PR_SET_PDEATHSIG
        if os.getppid() != parent:                       # it ended before the call
            os._exit(1)


def _fork(function, rank, world, port, failures, graceful):
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        end_with(parent)
        os.environ.update(_environment(rank, world, port))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)    # not what this process did when it was the parent
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if graceful:
            listen()
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else (0 if stop.code is None else 1)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        first = min((at for at in struct.unpack_from(f"{world}d", failures) if at), default=None)
        if first and time.monotonic() - first < GRACE_SECONDS:           # it lost its peer; the cause stands above
            print(f"[rank {rank}/{world}] {time.strftime('%H:%M:%S')} then failed too: {type(error).__name__}: "
                  f"{(str(error).splitlines() or [''])[0][:120]}", file=sys.stderr)
        else:
            print(f"[rank {rank}/{world}] {time.strftime('%H:%M:%S')} failed:\n{traceback.format_exc()}", file=sys.stderr)
    if code:                                             # before the others can notice
        struct.pack_into("d", failures, 8 * rank, time.monotonic())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)                                       # no clean-up of what the parent owns


def _spawn(rank, world, port):
    parent = os.getpid()
    return subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **_environment(rank, world, port)},
                            preexec_fn=lambda: end_with(parent)).pid


def start(function, world, gpu=False, say=lambda text: print(text, file=sys.stderr), graceful=False):
    """Run `function` as `world` ranks; return 0 when all of them returned, else the exit code of the first that failed.

    With gpu=True each rank is this program started again with RANK set. When a rank ends badly the others get
    GRACE_SECONDS to see it (gloo and NCCL report a lost peer) and are ended then, so the job never hangs on a
    dead rank. The message names the rank. graceful: the first Ctrl-C or SIGTERM is passed on to ranks that call
    `listen`, so that they stop by themselves, and the code is then 130 or 143; the second ends them.
    """
    port = free_port()
    failures = mmap.mmap(-1, 8 * world)                  # when each fork failed; 0: it could not say, a signal ended it
    asked = []

    def terminated(number, _):
        if not graceful or asked:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        asked.append(number)
    before = {number: signal.signal(number, terminated) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.SIG_IGN)       # a rank that does not listen yet survives it
    pids, failed, deadline, told, late = {}, 0, None, 0.0, []
    try:
        for rank in range(world):
            pids[_spawn(rank, world, port) if gpu else _fork(function, rank, world, port, failures, graceful)] = rank
        while pids:
            if asked and time.monotonic() > told + 1:    # again and again: a rank may not have listened yet
                if not told:
                    say("stopping after this step; press Ctrl-C again to end at once")
                told = time.monotonic()
                for pid in pids:
                    os.kill(pid, signal.SIGUSR1)
            ended = [(pid, status) for pid, status in (os.waitpid(pid, os.WNOHANG) for pid in pids) if pid]
            # of ranks found ended at once the first is the cause, the others lost their peer
            for pid, status in sorted(ended, key=lambda one: struct.unpack_from("d", failures, 8 * pids[one[0]])):
                rank, code = pids.pop(pid), os.waitstatus_to_exitcode(status)
                if code in (watchdog.HANGS, watchdog.WAITS):
                    late.append((code, rank))
                elif late and code == 1 and not gpu and not any(failures[8 * rank:8 * rank + 8]):
                    late.append((watchdog.HANGS, rank))              # ended by faulthandler: an exception would have left its time
                if code and not failed:
                    failed, deadline = (128 - code if code < 0 else code), time.monotonic() + GRACE_SECONDS
                    reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                    if code not in (watchdog.HANGS, watchdog.WAITS):
                        say(f"rank {rank} of {world} {reason}"
                            + (f"; ending the other {'rank' if world == 2 else 'ranks'}" if pids else ""))
            if deadline and time.monotonic() > deadline:
                for pid, rank in pids.items():
                    os.kill(pid, signal.SIGKILL)
                    if late and (watchdog.HANGS, rank) not in late:
                        late.append((watchdog.HANGS, rank))          # it could not even print its stacks
            time.sleep(0.02)
    except BaseException:                                # Ctrl-C and the like: leave no rank behind
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if late:
        hung = sorted(rank for code, rank in late if code == watchdog.HANGS)
        names = f"rank{'s' if len(hung) > 1 else ''} {', '.join(map(str, hung))} of {world}"
        say(f"no rank has moved for too long (timeout_seconds=): {names} hung" if hung else
            "no rank has moved for too long (timeout_seconds=): each waited for another in a collective")
    return failed or (128 + asked[0] if asked else 0)
