"""What measuring costs: the program's training loop against the smallest bare DeepSpeed loop, in alternation.

    python strategies/benchmark.py                       # dp, zero2 and zero3, five minutes on a quiet laptop
    python strategies/benchmark.py strategy=offload rounds=8 model=gpt2
    python strategies/benchmark.py record=cpu2           # for commits: results/cpu2/strategies/benchmark.json
    python strategies/benchmark.py table=cpu2            # print the table of a committed record again

Three loops take the same model, tokens, threads, DeepSpeed config and optimizer: the bare one (function `bare`), the program's with
count=False, and with count=True. In each round all three have fresh ranks and take turns, a step each, in the order A B C C B A
...: what else the machine does disturbs them alike. A round gives the median of the ratios of neighbouring steps after the
warm-up; the rounds give a mean with its 95 % interval. The bare loop reads its own loss at each step, as any program does that
shows one; the all-reduce by which the program's ranks agree is an overhead like the rest.
All three must give the same losses.
"""

import contextlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from strategies.effective import FOLDERS
from yardstick import results
from yardstick.settings import Choice, Either, SettingsError, override

CONFIG = {
    "strategy": Choice("several", *FOLDERS),   # several: SEVERAL
    "rounds": 3,                          # of each strategy; the interval takes 2 or more
    "steps": 14,                          # of each loop in a round, the first SKIPPED and the last apart
    "model": "tiny",                      # as in real_model_example.py, like the next three
    "global_batch": 4,
    "seq": 128,
    "precision": Choice("auto", "fp32", "bf16"),
    "record": Either(str),                # LABEL: write the record to results/LABEL/strategies/benchmark.json
    "table": Either(str),                 # LABEL: print the table of results/LABEL and run nothing
}
SEVERAL = ("dp", "zero2", "zero3")
LOOPS = ("bare", "uncounted", "counted")       # counted: the program as it is; uncounted: with count=False
AIMS = {"uncounted": 1.02, "counted": 1.05}    # of the mean ratio
SKIPPED = 5                # steps: stage 3 learns the modules' order in two, the ledger looks at the third, on a GPU a profiler at the fourth
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
#          97.5 % quantile of Student's t for 1, 2, ... degrees of freedom; the last serves for more


def main():
    settings = override(CONFIG, sys.argv[1:], where="strategies/benchmark.py")
    if settings["table"]:
        results.check_label(settings["table"])
        print(table(results.read("strategies/benchmark", settings["table"])))
        return 0
    from yardstick import ranks
    if ranks.is_rank() and "BENCHMARK_RUN" not in os.environ:
        raise SettingsError("RANK is set: a launcher started this program. Start it as python strategies/benchmark.py; it starts the "
                            "ranks of each run itself.")
    if ranks.is_rank():                   # on a GPU each rank is this program again
        return measured_loop(*os.environ["BENCHMARK_RUN"].split(), settings)
    for key, least in (("rounds", 1), ("steps", SKIPPED + 3)):
        if settings[key] < least:
            raise SettingsError(f"{key}={settings[key]} must be at least {least}. Give {key}={least}, for example.")
    results.check_label(settings["record"])
    strategies = SEVERAL if settings["strategy"] == "several" else (settings["strategy"],)
    begin, medians, loads = time.monotonic(), {s: [] for s in strategies}, []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BENCHMARK_FOLDER"] = folder
        for number in range(settings["rounds"]):
            for strategy in strategies:
                runs = run(strategy, settings, ranks)
                check_losses(strategy, runs)
                medians[strategy].append({loop: statistics.median(runs[loop]["seconds"]) for loop in LOOPS})
                for loop in AIMS:
                    pairs = zip(runs[loop]["seconds"], runs["bare"]["seconds"])
                    medians[strategy][-1][f"{loop}_ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
                loads.append(os.getloadavg()[0])
                print(f"[{number + 1}/{settings['rounds']}] {strategy}: " + ", ".join(
                    f"{loop} {1e3 * medians[strategy][-1][loop]:.1f} ms" for loop in LOOPS)
                    + f" ({time.monotonic() - begin:.0f} s so far)", file=sys.stderr, flush=True)
    world, gpu = ranks.default_world(), ranks.gpu_count() > 0
    machine = {"accelerator": ranks.gpu_name() if gpu else "none", "ranks": world}
    summary = summarise(medians)
    settings = {key: settings[key] for key in ("strategy", "rounds", "steps", "model", "global_batch", "seq", "precision", "record")}
    label = settings.pop("record")
    path = results.write("strategies/benchmark", settings=settings, measured=summary.pop("measured"), predicted={}, machine=machine,
                         details={**summary, "medians": medians, "load_average_max": max(loads)}, label=label)
    print(table(json.loads(path.read_text())))
    print(f"record: {path.relative_to(results.ROOT)}")
    return 0


def run(strategy, settings, ranks):
    """One round with fresh ranks: {loop: {"seconds": [of each turn that counts], "loss": [mean over ranks of each step]}}."""
    folder = Path(os.environ["BENCHMARK_FOLDER"])
    groups = {}
    for loop in LOOPS:
        os.environ["BENCHMARK_RUN"], os.environ["RUN_STAMP"] = f"{strategy} {loop}", f"benchmark-{os.getpid()}-{loop}"
        plan = plan_of(strategy, loop, settings)
        for rank in range(plan.world):
            (folder / f"turn_{loop}_{rank}").unlink(missing_ok=True)
            os.mkfifo(folder / f"turn_{loop}_{rank}")
        groups[loop] = plan
    pids = {}
    for loop, plan in groups.items():
        os.environ["BENCHMARK_RUN"], os.environ["RUN_STAMP"] = f"{strategy} {loop}", f"benchmark-{os.getpid()}-{loop}"
        pids[multiprocessing.get_context("fork").Process(target=_group, args=(strategy, loop, settings, plan, ranks))] = loop
        list(pids)[-1].start()
    try:
        while alive := [process for process in pids if process.exitcode is None]:
            multiprocessing.connection.wait([process.sentinel for process in alive])
            if failed := [process for process in pids if process.exitcode]:
                sys.exit(f"benchmark.py: {strategy}, {pids[failed[0]]}, ended with exit code {failed[0].exitcode}; its messages are above.")
    finally:
        for process in pids:
            process.kill()                                   # its ranks die with it; the others would wait for their turn
            process.join()
    return {loop: json.loads((folder / f"{loop}.json").read_text()) for loop in LOOPS}


def _group(strategy, loop, settings, plan, ranks):
    sys.exit(ranks.start(lambda: measured_loop(strategy, loop, settings, plan), plan.world, gpu=plan.gpu))


class Turns:
    """Lets the ranks of three loops step one after another: rank r of a loop hands over to rank r of the next.

    Turn n of loop k is number 3 n + k where n is even and 3 n + 2 - k where it is odd. A loop may begin its turn when it finds a
    byte in its pipe.
    """

    def __init__(self, loop, rank, steps, gpu):
        self.index, self.steps, self.gpu, self.seconds, self.at = LOOPS.index(loop), steps, gpu, [], 0
        folder = Path(os.environ["BENCHMARK_FOLDER"])
        self.pipes = [os.open(folder / f"turn_{name}_{rank}", os.O_RDWR) for name in LOOPS]
        if self.index == 0:
            os.write(self.pipes[0], b".")

    def __call__(self, *_):
        """The end of a turn, but for the first call, and the wait for the next, but for the last. Call it at the same place of each step."""
        if self.gpu:
            import torch
            torch.cuda.synchronize()
        if self.at:
            self.seconds.append(time.perf_counter() - self.begun)
            turn = self.at - 1
            number = 3 * turn + (self.index if turn % 2 == 0 else 2 - self.index) + 1
            os.write(self.pipes[number % 3 if number // 3 % 2 == 0 else 2 - number % 3], b".")
        self.at += 1
        if self.at < self.steps:
            os.read(self.pipes[self.index], 1)
        self.begun = time.perf_counter()


def plan_of(strategy, loop, settings):
    """The Plan of one run; the learning rate is constant, because the bare loop has no schedule."""
    import real_model_example
    from strategies import checks
    from yardstick.settings import defaults
    chosen = {**defaults(real_model_example.CONFIG), "strategy": strategy, "count": loop == "counted", "eval_batches": 0, "sample_tokens": 0,
              "schedule": "constant", "warmup_steps": 0,
              **{key: settings[key] for key in ("steps", "model", "global_batch", "seq", "precision")}}
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            plan = checks.check(chosen)
        except SettingsError:
            raise
        except BaseException:
            print(said.getvalue(), file=sys.__stderr__)
            raise
    plan.brief = True
    return plan


def measured_loop(strategy, loop, settings, plan=None):
    """One rank's run of one loop; rank 0 writes the seconds of its turns, and the losses."""
    import shutil

    import real_model_example
    plan = plan or plan_of(strategy, loop, settings)
    turns = Turns(loop, os.environ["RANK"], settings["steps"], plan.gpu)
    done = bare(plan, turns) if loop == "bare" else real_model_example.train(plan, after_backward=turns, finish=False)
    if plan.swap:
        shutil.rmtree(plan.swap, ignore_errors=True)
    if done["rank"].rank == 0:
        # the last turn is left out: the loops before have nothing to wait for any more
        written = {"seconds": turns.seconds[SKIPPED - 1:-1], "loss": done["loss"]}
        (Path(os.environ["BENCHMARK_FOLDER"]) / f"{loop}.json").write_text(json.dumps(written))


def bare(plan, turns):
    """The smallest DeepSpeed program on a plan's model, tokens and config: set up like `train`, and nothing more in its loop."""
    import deepspeed
    import torch

    from strategies import models
    from yardstick import data, matmul, op_cache, ranks
    op_cache.do_without("deepspeed_shm_comm")
    op_cache.load(plan.ops)
    rank = ranks.join(plan.gpu, plan.settings["timeout_seconds"])
    matmul.choose(rank)
    torch.manual_seed(plan.settings["seed"])
    model = models.build(plan)
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=plan.config)[0]
    del model
    torch.manual_seed(plan.settings["seed"] + 1 + rank.rank)
    batches = data.Batches(plan.corpus.train, plan.seq, plan.global_batch, plan.settings["seed"])
    history = []
    engine.train()
    for step in range(plan.settings["steps"]):
        tokens_ABT = torch.from_numpy(batches.step(step, rank.rank, rank.world, plan.accumulation)).to(engine.device)
        total = 0.0
        for tokens_BT in tokens_ABT:
            loss = engine(input_ids=tokens_BT, labels=tokens_BT).loss
            engine.backward(loss)
            total += loss.detach()
            if engine.is_gradient_accumulation_boundary():
                turns()
            engine.step()
        history.append(total.item() / plan.accumulation)
    everyone = [None] * rank.world
    torch.distributed.all_gather_object(everyone, history)
    engine.destroy()
    return {"loss": [sum(losses) / rank.world for losses in zip(*everyone)], "rank": rank}


def check_losses(strategy, runs):
    """End where the loops did not compute the same: a ratio of their times would say nothing."""
    for loop in LOOPS[1:]:
        for step, (ours, theirs) in enumerate(zip(runs[loop]["loss"], runs["bare"]["loss"]), 1):
            if not math.isclose(ours, theirs, rel_tol=1e-3):
                sys.exit(f"benchmark.py: {strategy}, {loop}: the loss of step {step} is {ours} and the bare loop's {theirs}. They do not "
                         "train alike, so their times are not compared.")


def interval(ratios):
    """(mean, lower, upper) of ratios, by their logarithms: 95 % of Student's t; one ratio has no interval.

    >>> [round(value, 3) for value in interval([1.01, 1.02, 1.03])]
    [1.02, 0.995, 1.045]
    """
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    if len(logs) < 2:
        return math.exp(mean), math.nan, math.nan
    half = STUDENT[min(len(logs) - 1, len(STUDENT)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return tuple(math.exp(mean + x) for x in (0, -half, half))


def summarise(medians):
    """{"measured": flat numbers of the record, "intervals": {strategy or "all": {loop: [lower, upper]}}}."""
    measured, intervals = {}, {}
    for strategy, rounds in medians.items():
        measured[f"{strategy}_bare_step_seconds_median"] = statistics.median(one["bare"] for one in rounds)
    for strategy in (*medians, *(["all"] if len(medians) > 1 else [])):
        rounds = [one for s, every in medians.items() if strategy in (s, "all") for one in every]
        intervals[strategy] = {}
        for loop in AIMS:
            mean, *ends = interval([one[f"{loop}_ratio"] for one in rounds])
            measured[f"{strategy}_{loop}_ratio"] = mean
            intervals[strategy][loop] = None if math.isnan(ends[0]) else ends
    return {"measured": measured, "intervals": intervals}


def table(record):
    """Markdown: the ratios of each strategy and of all with their intervals, beside the aims."""
    got, settings, machine = record["measured"], record["settings"], record["machine"]
    lines = [f"{settings['model']}, {machine['ranks']} ranks, {settings['global_batch']} x {settings['seq']} tokens a step, {settings['rounds']} "
             f"rounds of {settings['steps']} steps; time of a step over the bare loop's, mean and 95 % interval:", "",
             "| strategy | bare loop, ms | count=False | count=True |", "|---|---:|---:|---:|"]
    for strategy, ends in record["details"]["intervals"].items():
        milliseconds = f"{1e3 * got[f'{strategy}_bare_step_seconds_median']:.1f}" if strategy != "all" else ""
        cells = [f"{got[f'{strategy}_{loop}_ratio']:.3f}" + (f" ({ends[loop][0]:.3f} to {ends[loop][1]:.3f})" if ends[loop] else "")
                 for loop in AIMS]
        lines.append(f"| {strategy} | {milliseconds} | {' | '.join(cells)} |")
    lines.append(f"| aim | | {' | '.join(f'{aim:.3f}' for aim in AIMS.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SettingsError, ValueError, FileNotFoundError) as error:
        sys.exit(f"benchmark.py: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"benchmark.py: this Python ({sys.executable}) has no module {error.name}. Start by strategies/3_zero_stage2/run.sh, which "
                 "makes what is missing, or run `source env.sh` first, or pip install -r requirements.txt.")
    except KeyboardInterrupt:
        sys.exit(130)
