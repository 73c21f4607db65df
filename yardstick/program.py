"""From a command line to ranks: help, settings, checks, compiled ops, ranks, and one message where something is wrong.

    CONFIG = {"steps": 20}                     # see yardstick.settings
    def check(run): ...                        # optional; raises SettingsError, before any rank starts
    def train(run):                            # one rank; run.settings, run.world, run.gpu, run.folder
        rank = run.join()
        ...
    if __name__ == "__main__":
        program.main(__file__, CONFIG, train, check)

Started by python it starts its ranks itself, on every GPU or as CPU processes; started by torchrun, deepspeed or srun it is one
of them. Import it before deepspeed: it chooses DeepSpeed's device and the level of its log.
"""

import json
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from yardstick import launchers, matmul, op_cache, ranks, results
from yardstick.settings import SettingsError, override, usage

os.environ.setdefault("DS_LOG_LEVEL", "error")
warnings.filterwarnings("ignore", category=FutureWarning)          # of libraries to each other; no user can act on them
if not ranks.gpu_count():
    ranks.use_cpu_accelerator()


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

    def join(self, seconds=600):
        """Make this process a rank: load the compiled ops, join the process group -> yardstick.ranks.Rank.

        seconds: how long a collective waits for the other ranks before it raises.
        """
        op_cache.do_without("deepspeed_shm_comm")
        if not self.gpu:
            op_cache.load(self.ops)
        rank = ranks.join(self.gpu, seconds)
        matmul.choose(rank)
        return rank

    def record(self, rank, measured, predicted=None, estimated=None, details=None):
        """Rank 0 writes the run's record, into its folder or, with the setting record=LABEL, to results/LABEL/, and says where."""
        if rank.rank:
            return
        path = results.write(self.name, settings=self.settings, measured=measured, predicted=predicted or {}, estimated=estimated,
                             details=details, label=self.settings.get("record"), folder=self.folder,
                             machine={"accelerator": ranks.gpu_name() if self.gpu else "none", "ranks": self.world})
        print(f"record: {os.path.relpath(path)}", flush=True)


def main(file, config, train, check=None, cpu_ranks=2):
    """Run a program from its command line and end the process: exit code 0, or not 0 and a message.

    cpu_ranks: how many processes where there is no GPU and RANKS is not set.
    """
    short = Path(file).resolve().relative_to(ranks.ROOT).as_posix()
    try:
        sys.exit(_run(file, short, config, train, check, cpu_ranks))
    except (SettingsError, op_cache.OpError) as error:
        sys.exit(f"{short}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _run(file, short, config, train, check, cpu_ranks):
    launchers.adopt()
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if text := usage(arguments, file):
        print(text)
        return 0
    launchers.check()
    settings = override(config, arguments, where=short)
    results.check_label(settings.get("record"))
    gpu = ranks.gpu_count() > 0
    if not gpu:
        os.environ.setdefault("RANKS", str(cpu_ranks))
    world = int(os.environ["WORLD_SIZE"]) if ranks.is_rank() else _default_world()
    name = short.removesuffix(".py")
    run = Run(name, settings, world, gpu, _folder(name, settings))
    if check:
        check(run)
    if not gpu:
        op_cache.prepare(run.ops, say=lambda text: print(text, file=sys.stderr))
    if ranks.is_rank():
        _traced(train, run, file)
        return 0
    return ranks.start(lambda: _traced(train, run, file), world, gpu=gpu)


def _default_world():
    try:
        return ranks.default_world()
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _folder(name, settings):
    if settings.get("output"):
        return Path(settings["output"]).resolve()
    pid = os.getppid() if ranks.is_rank() else os.getpid()          # ranks of one launcher have the same parent
    stamp = os.environ.setdefault("RUN_STAMP", f"{time.strftime('%Y%m%d-%H%M%S')}-{pid}")
    return ranks.ROOT / "runs" / name / stamp


def _traced(train, run, file):
    """train(run); where CALL_TRACE names a folder, under a call tracer that leaves there what this rank entered.

    The files are {"FILE:SYMBOL of DeepSpeed": [lines of the program that stood on the stack]}: yardstick.deepspeed_proof.
    """
    folder = os.environ.get("CALL_TRACE")
    if not folder:
        return train(run)
    from yardstick import call_trace
    from yardstick.deepspeed_source import Package
    trace = call_trace.CallTrace(Package.at().folder, script=os.path.abspath(file))
    with trace:
        train(run)
    lines = {symbol: sorted(numbers) for symbol, numbers in trace.lines.items()}
    Path(folder, f"{os.getpid()}.json").write_text(json.dumps(lines))
