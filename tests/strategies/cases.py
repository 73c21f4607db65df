"""Runs functions as ranks of a fresh process, and hands back what each rank returned and printed."""

import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"dp": "1_data_parallel", "zero1": "2_zero_stage1", "zero2": "3_zero_stage2", "zero3": "4_zero_stage3",
           "offload": "5_zero_offload", "infinity": "6_zero_infinity"}
ORDER = tuple(FOLDERS)
# GPT-2s that take milliseconds; the vocabulary is the embedded tokenizer's, or larger
SMALL = {"n_layer": 2, "n_embd": 96, "n_head": 4, "vocab_size": 4096, "n_positions": 64}
# neither the tensors nor their sum divide by 2, 3 or 4 ranks: shares are padded, and tensors straddle them
ODD = {"n_layer": 2, "n_embd": 35, "n_head": 5, "vocab_size": 4099, "n_positions": 32}
# of two ranks' shares some reach the MiB from which DeepSpeed moves weights to NVMe, others do not
WIDE = {"n_layer": 1, "n_embd": 512, "n_head": 8, "vocab_size": 4096, "n_positions": 64}
BUCKET = 50_000        # elements; the odd model's embedding is larger
# Each strategy in both precisions and with both accumulations; infinity computes in bf16 only.
CASES = [(strategy, precision, accumulation) for strategy in ORDER[:5]
         for precision, accumulation in (("fp32", 2), ("bf16", 1))] + [("infinity", "bf16", 2)]
OTHERS = [(strategy, precision, 3 - accumulation) for strategy, precision, accumulation in CASES]
# what torchrun and its like tell a rank
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "RUN_STAMP", "STARTED_BY")
_numbers = itertools.count()


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    code: int              # what ranks.start returned; negative: the signal that ended the process which called it
    ranks: list            # what each rank returned, None where it did not come to that
    log: str               # standard output and error of all of them
    seconds: float

    def good(self):
        """What the ranks returned, after asserting that the run ended well."""
        assert self.code == 0, f"exit code {self.code}; the end of what it printed:\n{self.log[-4000:]}"
        return self.ranks


def launch(server, folder, maker, *arguments, ranks=2, seconds=300, environment=None, started=None):
    """Call maker(*arguments) in a fresh process, then run the function that it returns as `ranks` ranks.

    maker: a function that can be imported; what it does is done once, before the ranks are forked. started: called
    here with the process, to disturb it.
    """
    folder = Path(folder) / f"launch{next(_numbers)}"
    folder.mkdir()
    begin = time.monotonic()
    process = server.Process(target=_start, args=(maker, arguments, ranks, folder, environment or {}))
    process.start()
    try:
        if started:
            started(process)
        process.join(seconds)
        ended = process.exitcode is not None
    finally:
        process.kill()                     # its ranks die with it
        process.join()
    log = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else ""
    assert ended, f"no end within {seconds} s; the end of what it printed:\n{log[-4000:]}"
    files = [folder / f"rank{rank}" for rank in range(ranks)]
    returned = [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
    return Outcome(process.exitcode, returned, log, time.monotonic() - begin)


def _start(maker, arguments, count, folder, environment):
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.chdir(folder)
    os.environ.update({"RANKS": str(count), **environment})
    from yardstick import ranks
    function = maker(*arguments)

    def rank():
        result = function()
        part = folder / f"part{os.environ['RANK']}"
        part.write_bytes(pickle.dumps(result))
        part.rename(folder / f"rank{os.environ['RANK']}")
    sys.exit(ranks.start(rank, count))


def model_folder(folder, **sizes):
    """Write the config of a GPT-2 of these sizes, without dropout, and return the folder as text, for model=."""
    from transformers import GPT2Config
    GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
               use_cache=False).save_pretrained(folder)
    return str(folder)


def settings(**changes):
    """The training program's settings with `changes`, its output under the current folder."""
    from real_model_example import CONFIG
    from yardstick.settings import defaults
    assert set(changes) <= set(CONFIG), f"no settings: {set(changes) - set(CONFIG)}"
    return {**defaults(CONFIG), "eval_batches": 0, "sample_tokens": 0, "output": "run", **changes}


def plan(**changes):
    """The Plan of a run with `changes`. Matrix products stay in plain fp32 on every rank, whatever is faster."""
    import torch

    from strategies import checks
    from yardstick import matmul

    def plain(rank):
        torch.set_float32_matmul_precision("highest")
        return "highest"
    matmul.choose = plain
    return checks.check(settings(**changes), given=set(changes))


def environment(**changes):
    """That of a user who has activated the environment of these tests, on a machine without a GPU."""
    left_out = (*OF_LAUNCHERS, "OWN_VENV", "PYTHONPATH", "RANKS")
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**inherited, "VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **changes}


def command(words, cwd=ROOT, seconds=300, **changes):
    """Run a command as a user types it."""
    return subprocess.run(words, cwd=cwd, env=environment(**changes), timeout=seconds, capture_output=True,
                          text=True)


def toy(model, output):
    """Settings of a run that takes no time."""
    return [f"model={model}", f"output={output}", "steps=2", "seq=16", "eval_batches=0", "sample_tokens=0"]


def record(ended, folder):
    """The record of a finished run, after asserting that it ended well, explained itself and drew its figure."""
    assert ended.returncode == 0, f"exit code {ended.returncode}:\n{ended.stderr[-4000:]}"
    written = json.loads((folder / "record.json").read_text())
    assert str(folder / "record.json") in ended.stdout and "Held by each rank" in ended.stdout
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert written["outcome"] == "ok" and len(written["details"]["loss"]) == written["settings"]["steps"]
    measured, predicted = written["measured"], written["predicted"]
    assert measured["unnamed_bytes"] == 0 and measured["optimizer_bytes"] == predicted["optimizer_bytes"]
    assert measured.get("ring_bytes") == predicted.get("ring_bytes")
    assert written["machine"]["ranks"] == 1 or measured["payload_bytes"] == predicted["payload_bytes"]
    return written


@dataclass(frozen=True)
class Count:
    """What one rank's run held and sent, by the program's own counters, and what its prediction needs."""

    tensors: object        # deepspeed_memory.Tensors
    config: dict           # as DeepSpeed had it
    ranks: int
    rank: int
    accumulation: int
    batch: tuple           # (micro_batch, seq)
    moments: dict          # {"gradients" or "always": (ledger rows, storages without a name)}
    activations: int       # bytes that autograd saved, at their peak
    traffic: list          # of Meter.per_step
    dispatched: dict       # {(kind, phase): payload bytes of a step} by a TorchDispatchMode, where asked for


def counting(changes, dispatch=False):
    """Ranks of the program, counted: a Count each. dispatch: count collectives a second time, below the first."""
    made = plan(**{"steps": 3, "seq": 16, "micro_batch": 1, "count": True, **changes})

    def rank():
        from contextlib import nullcontext

        from real_model_example import train
        from yardstick import probe
        seen = {}

        class Kept(probe.Probe):
            def __init__(self, engine, meter, watchdog, **options):
                super().__init__(engine, meter, watchdog, **options)
                seen.update(probe=self, meter=meter)
        probe.Probe = Kept                               # the program keeps its probe to itself
        watch = _dispatch_counter(seen) if dispatch else nullcontext()
        with watch:
            train(made, finish=False)
        steps = seen["probe"].counted_steps()
        return Count(made.tensors, made.config, made.world, int(os.environ["RANK"]), made.accumulation,
                     (made.micro_batch, made.seq), seen["probe"].moments, seen["probe"].activations,
                     seen["meter"].per_step(steps, made.world),
                     {key: size / steps for key, size in watch.sums.items()} if dispatch else {})
    return rank


def _dispatch_counter(seen):
    """A mode below torch.distributed: whoever calls a collective, torch dispatches it as an operator."""
    from collections import Counter

    from torch.utils._python_dispatch import TorchDispatchMode
    # which argument is the full tensor, by which the Meter counts
    tensor_of = {"allreduce_": ("all_reduce", 0), "_allgather_base_": ("all_gather", 0),
                 "_reduce_scatter_base_": ("reduce_scatter", 1), "broadcast_": ("broadcast", 0)}

    class Dispatched(TorchDispatchMode):
        sums = Counter()

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            meter = seen.get("meter")
            if operator.namespace == "c10d" and meter and meter.counting and not meter.what:
                kind, where = tensor_of.get(operator._opname, (operator._opname, None))
                tensors = [] if where is None else args[where]
                tensors = tensors if isinstance(tensors, (list, tuple)) else [tensors]
                self.sums[kind, meter.phase] += sum(t.numel() * t.element_size() for t in tensors)
            return operator(*args, **(kwargs or {}))
    return Dispatched()
