"""From a command line to ranks: help, settings, checks, compiled ops, ranks, and one message where something is wrong.

    CONFIG = {"steps": 20}                     # see yardstick.settings
    def check(run): ...                        # optional; raises SettingsError, before any rank starts
    def train(run):                            # one rank; run.settings, run.world, run.gpu, run.folder
        rank = run.join()
        ...
    if __name__ == "__main__":
        program.main(__file__, CONFIG, train, check)

Started by python it starts its ranks itself, on every GPU or as CPU processes; started by torchrun, deepspeed or srun it is one
of them. Import it before deepspeed: it chooses DeepSpeed's device.
"""

import json
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from multiprocessing.context import SpawnProcess
from pathlib import Path

from yardstick import launchers, matmul, op_cache, ranks, results
from yardstick.settings import SettingsError, check_writable, override, usage

warnings.filterwarnings("ignore", category=FutureWarning)          # of libraries to each other; no user can act on them
warnings.filterwarnings("ignore", message="'pin_memory' argument")  # DeepSpeed's loader asks for it on a CPU too
if not ranks.gpu_count():
    ranks.use_cpu_accelerator()

FULL = 2**20                     # bytes: with less than this free, a write has failed for want of space


@dataclass
class Run:
    """One start of a program, the same on every rank.

    settings: {name: value}. ops: names of the C++ ops of yardstick.op_cache that it needs, for check to fill. folder: the run's
    own, under the git-ignored runs/, or where the setting `output` says; made when something is written.
    """

    name: str                    # "annotated_scripts/01_hello_deepspeed_annotated"
    settings: dict
    world: int
    gpu: bool
    folder: Path
    ops: list = field(default_factory=list)
    turn: dict = field(default_factory=dict)       # of the settings, those that this turn of `main` changed

    def join(self, seconds=600, deepspeed=True):
        """Make this process a rank: load the compiled ops, join the process group -> yardstick.ranks.Rank.

        seconds: how long a collective waits for the other ranks before it raises. deepspeed: the program trains with it.
        """
        import torch
        os.environ["RANK_PROCESS"] = str(os.getpid())               # for `worker`
        if deepspeed:
            op_cache.do_without("deepspeed_shm_comm")
            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # a config's log_level changes it
            if not self.gpu:
                op_cache.load(self.ops)
        rank = ranks.join(self.gpu, seconds, deepspeed)
        if self.world > 1:                                          # a launcher's ranks named the folder each by its own clock
            agreed = [str(self.folder)]
            torch.distributed.broadcast_object_list(agreed, 0)
            self.folder = Path(agreed[0])
        matmul.choose(rank)
        return rank

    def record(self, rank, measured, predicted=None, estimated=None, details=None, outcome="ok"):
        """Rank 0 writes the run's record, into its folder or, with the setting record=LABEL, to results/LABEL/, and says where."""
        if rank.rank:
            return
        path = results.write(self.name, settings=self.settings, measured=measured, predicted=predicted or {}, estimated=estimated,
                             details=details, outcome=outcome, label=self.settings.get("record"), folder=self.folder,
                             machine={"accelerator": ranks.gpu_name() if self.gpu else "none", "ranks": self.world})
        print(f"record: {os.path.relpath(path)}", flush=True)

    def beside(self, figures):
        """Keep the JSON figures of this turn in the run's folder -> {turn: figures}, this turn's and those of the other turns
        there whose settings were otherwise the same. For rank 0.
        """
        else_same = {key: value for key, value in self.settings.items() if key not in (*self.turn, "record", "output")}
        name = "_".join(str(value) for value in self.turn.values())
        text = json.dumps({"ranks": self.world, "settings": else_same, "figures": figures}, allow_nan=False)
        results.replace_file(self.folder / "turns" / f"{name}.json", text)
        mine, found = json.loads(text), {}
        for path in sorted(self.folder.glob("turns/*.json"), key=lambda path: path.stat().st_mtime_ns):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if (kept["ranks"], kept["settings"]) == (mine["ranks"], mine["settings"]):
                found[path.stem] = kept["figures"]
        return found


def main(file, config, train, check=None, cpu_ranks=2, turns=None):
    """Run a program from its command line and end the process: exit code 0, or not 0 and a message.

    cpu_ranks: how many processes where there is no GPU and RANKS is not set. turns: settings -> [{changed settings}], one dict
    for each time that fresh ranks are started with these changes, in turn and with one folder; None: once, with none.
    """
    short = Path(file).resolve().relative_to(ranks.ROOT).as_posix()
    try:
        sys.exit(_run(file, short, config, train, check, cpu_ranks, turns))
    except (SettingsError, op_cache.OpError) as error:
        sys.exit(f"{short}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def columns(figures):
    """The text of a table of {title: {name: number}}: a column for each title, a row for each name.

    >>> columns({"a": {"x": 1}, "b": {"y": 2.5}}).split()
    ['a', 'b', 'x', '1', 'y', '2.5']
    """
    rows = [f"{'':<40}" + "".join(f"{title:>16}" for title in figures)]
    for name in dict.fromkeys(name for column in figures.values() for name in column):
        cells = (f"{column[name]:,.6g}" if name in column else "" for column in figures.values())
        rows.append(f"{name:<40}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(rows)


def worker(ops=()):
    """For a program whose ranks spawn processes: to be called where it is imported as "__mp_main__", which multiprocessing does
    in each of them. The process then ends when its rank does, however that happens, and has the compiled ops of `ops`.
    """
    ranks.end_with(int(os.environ["RANK_PROCESS"]))
    if not ranks.gpu_count():
        op_cache.load(ops)


def watch_workers():
    """From now on end this rank, with exit code 1 and a message, when a process that it spawns dies: DeepSpeed waits for minutes."""
    start = SpawnProcess.start

    def watched(child):
        start(child)
        threading.Thread(target=end_with, args=(child,), daemon=True).start()

    def end_with(child):
        child.join()
        if child.exitcode:
            print(f"[rank {os.environ['RANK']}/{os.environ['WORLD_SIZE']}] its worker process {child.pid} ended with exit code "
                  f"{child.exitcode}", file=sys.stderr, flush=True)
            os._exit(1)                                             # the main thread may wait inside C++
    SpawnProcess.start = watched


def _run(file, short, config, train, check, cpu_ranks, turns):
    launchers.adopt()
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if text := usage(arguments, file):
        print(text)
        return 0
    launchers.check()
    settings = override(config, arguments, where=short)
    try:
        results.check_label(settings.get("record"))
    except ValueError as error:
        raise SettingsError(str(error)) from None
    gpu = ranks.gpu_count() > 0
    if not gpu:
        os.environ.setdefault("RANKS", str(cpu_ranks))
    world = int(os.environ["WORLD_SIZE"]) if ranks.is_rank() else _default_world()
    name = short.removesuffix(".py")
    changes = turns(settings) if turns else [{}]
    if ranks.is_rank() and len(changes) > 1:
        if "TURN" not in os.environ:
            one = " or ".join(" ".join(f"{key}={value}" for key, value in change.items()) for change in changes)
            raise SettingsError(f"these settings start ranks {len(changes)} times in turn, which a launcher cannot: give {one}, "
                                f"or start it by python {short}.")
        changes = [changes[int(os.environ["TURN"])]]
    runs = [Run(name, {**settings, **change}, world, gpu, _folder(name, settings), turn=change) for change in changes]
    for run in runs:
        try:
            if check:
                check(run)
        except (ValueError, MemoryError, OverflowError, OSError) as error:      # of what check has called; its own are SettingsErrors
            raise SettingsError(str(error).splitlines()[0] if str(error) else f"these settings end in a {type(error).__name__}.") from None
    for turn, run in enumerate(runs):
        if not gpu:
            op_cache.prepare(run.ops, say=lambda text: print(text, file=sys.stderr))
        if ranks.is_rank():
            _traced(train, run, file)
            return 0
        os.environ["TURN"] = str(turn)                              # for ranks that are this program started again
        if code := ranks.start(lambda: _traced(train, run, file), world, gpu=gpu):
            return code
    return 0


def _default_world():
    try:
        return ranks.default_world()
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _folder(name, settings):
    if settings.get("output"):
        return check_writable(Path(settings["output"]).resolve(), "output=")
    pid = os.getppid() if ranks.is_rank() else os.getpid()          # ranks of one launcher have the same parent
    stamp = os.environ.setdefault("RUN_STAMP", f"{time.strftime('%Y%m%d-%H%M%S')}-{pid}")
    return check_writable(ranks.ROOT / "runs" / name / stamp, "output=")


def _traced(train, run, file):
    """train(run); where CALL_TRACE names a folder, under a call tracer that leaves there what this rank entered.

    The files are {"FILE:SYMBOL of DeepSpeed": [lines of the program that stood on the stack]}: yardstick.deepspeed_proof.
    """
    folder = os.environ.get("CALL_TRACE")
    if not folder:
        return _with_space(train, run)
    from yardstick import call_trace
    from yardstick.deepspeed_source import Package
    trace = call_trace.CallTrace(Package.at().folder, script=os.path.abspath(file))
    with trace:
        _with_space(train, run)
    lines = {symbol: sorted(numbers) for symbol, numbers in trace.lines.items()}
    Path(folder, f"{os.getpid()}.json").write_text(json.dumps(lines))


def _with_space(train, run):
    """train(run); a failure on a full disk, which torch reports as it likes, says so."""
    try:
        train(run)
    except (OSError, RuntimeError) as error:
        there = next(parent for parent in (run.folder, *run.folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        if free > FULL:
            raise
        raise SystemExit(f"[rank {os.environ['RANK']}/{run.world}] the disk of {there} is full ({free:,} bytes are free): {str(error).splitlines()[0][:200]}. Make room, "
                         "or give another folder as output=.") from None
