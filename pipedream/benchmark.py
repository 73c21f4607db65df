"""Times what this folder claims to be fast, and holds the simulator against real pipelines.

    python pipedream/benchmark.py part=simulator            # seconds against operations, 10^4 to 10^6
    python pipedream/benchmark.py part=planner              # seconds of a plan
    RANKS=4 python pipedream/benchmark.py part=timeline     # a measured pipeline against its simulation
    python pipedream/benchmark.py part=peer                 # 1F1B here against torch.distributed.pipelining, in turn
    python pipedream/benchmark.py part=convergence          # asynchronous modes and synchronous SGD on one budget
    RANKS=4 python pipedream/benchmark.py part=equality     # every mode against one process
    python pipedream/benchmark.py part=published profiles=FOLDER       # plans for the profiles that PipeDream's authors published
"""

import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yardstick import program, schedules
from yardstick.settings import Choice, Either, SettingsError, defaults

CONFIG = {
    "part": Choice("simulator", "planner", "timeline", "peer", "convergence", "equality", "published"),   # what to measure
    "repeats": 5,                         # runs of each; timeline and peer give an interval over them
    "modes": "flush,gpipe,zb_h1,zb_v,stash",       # timeline: modes of pipedream_simple.py
    "pad_seconds": 0.06,                  # timeline: the least that an operation lasts; two cores cannot carry four ranks otherwise
    "steps": 150,                         # convergence: steps of micro_batches
    "micro_batches": 8,                   # of a step
    "learning_rates": "0.1,0.3,0.6",      # convergence: each mode with each
    "hidden": 128,                        # peer: width of the GPT
    "profiles": "../shared/data/pipedream_profiles",     # published: folder with NAME.graph.txt of github.com/msr-fiddle/pipedream
    "record": Either(str),                # LABEL: keep the record in results/LABEL/pipedream
    "output": Either(str),                # folder of the run
}
ALONE = ("simulator", "planner", "published")            # parts that need one process
# SOSP'19, table 1: model, machines per level (innermost first), bytes per second of their links, the paper's configuration there.
# Cluster A: servers of 4 V100 on PCIe, 10 Gbit/s between them; B: of 8 V100 on NVLink, 25 Gbit/s
PUBLISHED = (("vgg16", (4, 4), (12e9, 1.25e9), "15-1"), ("vgg16", (8, 2), (30e9, 3.125e9), "15-1"), ("vgg16", (16,), (3.125e9,), "15-1"),
             ("vgg16", (4,), (1e9,), None), ("vgg16", (8,), (12e9,), None), ("resnet50", (4, 4), (12e9, 1.25e9), "16"),
             ("resnet50", (16,), (1.25e9,), "16"), ("alexnet", (4, 4), (12e9, 1.25e9), "15-1"), ("alexnet", (16,), (1.25e9,), "15-1"))
PLANNED = (("resnet50 on 16 machines, one level", 16), ("chain of 1500 layers on 4 machines", 4))


def interval(values):
    """(mean, half of its 95 % interval) of a few values, by Student's t."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(len(values), 2.0)
    half = t * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return statistics.mean(values), half


def check(run):
    settings = run.settings
    if settings["repeats"] < 1 or settings["micro_batches"] < 1 or settings["steps"] < 1:
        raise SettingsError("repeats, micro_batches and steps must be at least 1.")
    if settings["part"] in ALONE and run.world != 1:
        raise SettingsError(f"part={settings['part']} runs in one process: set RANKS=1.")
    if settings["part"] == "published" and not list(profiles_of(settings).glob("*.graph.txt")):
        raise SettingsError(f"profiles={settings['profiles']} is no folder with NAME.graph.txt in it: copy them from profiler/image_classification/"
                            "profiles of github.com/msr-fiddle/pipedream.")
    if settings["part"] not in ALONE and run.world < 2:
        raise SettingsError(f"part={settings['part']} needs two ranks or more; RANKS={run.world}.")


def train(run):
    run.name = f"pipedream/benchmark_{run.settings['part']}" + (f"_{run.world}" if run.settings["part"] in ("timeline", "equality") else "")
    {"simulator": simulator, "planner": planner, "timeline": timeline, "peer": peer, "convergence": convergence, "equality": equality,
     "published": published}[run.settings["part"]](run)


def simulator(run):
    """Seconds of `simulate` on 1F1B of growing size."""
    from pipedream.simulator import simulate
    rank, rows = run.join(deepspeed=False), []
    for stages, micro_batches in ((16, 320), (32, 640), (64, 1024), (128, 1024), (128, 4096)):
        schedule = schedules.build("1f1b", stages, micro_batches)
        seconds = min(_timed(lambda: simulate(schedule, send=0.1)) for _ in range(min(3, run.settings["repeats"])))
        rows.append((stages, micro_batches, sum(map(len, schedule)), seconds))
        print(f"{stages:>4} stages x {micro_batches:>5} micro-batches: {rows[-1][2]:>9,} operations in {seconds:7.3f} s, "
              f"{seconds / rows[-1][2] * 1e6:.2f} us each")
    growth = math.log(rows[-1][3] / rows[0][3]) / math.log(rows[-1][2] / rows[0][2])
    print(f"seconds grow as operations to the power of {growth:.2f}")
    run.record(rank, {"largest_seconds": rows[-1][3], "largest_operations_count": rows[-1][2], "growth_ratio": growth},
               details={"rows": [list(row) for row in rows]})


def planner(run):
    """Seconds of `partition`, from the graph to the plan."""
    import torch

    from pipedream.graph import Graph, Node, cuts
    from pipedream.networks import resnet50
    from pipedream.partitioner import partition
    rank = run.join(deepspeed=False)
    from pipedream.profiler import profile
    torch.manual_seed(0)
    model, _ = resnet50()
    small = profile(model, torch.randn(2, 3, 32, 32), warm_up=0, repeats=1)            # its graph is what takes time, not its numbers
    long = Graph()
    for k in range(1500):
        long.add(Node(f"n{k}", f"layer {k}", 1 + k % 7, 2 + k % 5, 1e6 * (1 + k % 3), 1e5 * (k % 11)), [f"n{k - 1}"] if k else [])
    measured = {}
    for (name, machines), graph in zip(PLANNED, (small, long)):
        seconds = min(_timed(lambda: partition(graph, [machines], [1e9], activation_compression_ratio=1)) for _ in range(min(3, run.settings["repeats"])))
        print(f"{name}: {len(cuts(graph).whole)} states, {seconds:.2f} s")
        measured["resnet50_seconds" if graph is small else "chain_seconds"] = seconds
    run.record(rank, measured)


def timeline(run):
    """Makespan of real pipelines over that of their simulation with the measured time of every operation."""
    from pipedream.pipedream_simple import ASYNCHRONOUS, pipeline, schedule_of
    from pipedream.pipedream_simple import CONFIG as SIMPLE
    from pipedream.pipedream_simple import check as allowed
    from pipedream.simulator import simulate
    rank, measured, details = run.join(deepspeed=False), {}, {}
    for mode in run.settings["modes"].split(","):
        settings = {**defaults(SIMPLE), "mode": mode, "steps": 1, "micro_batches": run.settings["micro_batches"], "layers": 8, "hidden": 32, "heads": 2,
                    "seq": 16, "micro_batch": 1, "pad_seconds": run.settings["pad_seconds"], "check": False}
        one, ratios = program.Run(run.name, settings, run.world, run.gpu, run.folder / mode), []
        allowed(one)
        schedule = schedule_of(settings, run.world)
        for _ in range(run.settings["repeats"]):
            found = pipeline(one, rank)
            if rank.rank:
                continue
            events = found["events"]
            end = max(event[4] for row in events for event in row)
            again = simulate(schedule, durations=[[event[4] - event[3] for event in row] for row in events])
            ratios.append(end / again.makespan)
        if rank.rank == 0:
            mean, half = interval(ratios)
            measured[f"{mode}_ratio_mean"] = mean
            details[mode] = {"ratios": ratios, "interval": half, "simulated": again.rows,           # rows as in pipedream/timeline.py, of the last run
                             "measured": events}
            flushes = "" if mode not in ASYNCHRONOUS else ", asynchronous"
            print(f"{mode:<8} {run.world} ranks{flushes}: measured / simulated {mean:.3f} +- {half:.3f}", flush=True)
    run.record(rank, measured, details=details)


def peer(run):
    """Seconds of a 1F1B step here over torch's, alternated on the same parts, micro-batches and ranks."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    from pipedream.messages import Messages, communicators
    from pipedream.pipedream_simple import CONFIG as SIMPLE
    from pipedream.pipedream_simple import cut, interpret
    from pipedream.stages import Part, Stage
    from pipedream.torch_peer import step
    from yardstick.model import layers, loss_of
    from yardstick.shapes import ModelShape
    rank, count, last = run.join(deepspeed=False), run.settings["micro_batches"], run.world - 1
    shape = ModelShape(2 * run.world, run.settings["hidden"], 4, 512, 64, tied=False)
    tokens = torch.randint(512, (count, 4, 64), generator=torch.Generator().manual_seed(1)).to(rank.device)
    schedule = schedules.build("1f1b", run.world, count)
    stage = Stage(Part(cut(layers(shape, seed=1), run.world)[rank.rank], rank.rank, rank.rank == last).to(rank.device), 0.0)
    groups = communicators(schedule)
    settings = {**defaults(SIMPLE), "micro_batches": count}

    def ours():
        interpret(schedule, rank, [stage], Messages(schedule, rank, (4, 64, shape.hidden), torch.float32, groups), tokens, "flush", settings, [],
                  lambda k, loss: None)
        stage.take_gradients(0)
    module = nn.Sequential(*cut(layers(shape, seed=1), run.world)[rank.rank]).to(rank.device)
    theirs_run = Schedule1F1B(PipelineStage(module, rank.rank, run.world, rank.device), count, loss_fn=loss_of)

    def theirs():
        step(theirs_run, {rank.rank: module}, last, tokens.flatten(0, 1))
        module.zero_grad()
    ratios, pairs = [], []
    for turn in range(2 + 4 * run.settings["repeats"]):
        times = {}
        for name, function in (("ours", ours), ("theirs", theirs))[::1 if turn % 2 else -1]:
            dist.barrier()
            begun = time.perf_counter()
            function()
            seconds = torch.tensor(time.perf_counter() - begun)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            times[name] = seconds.item()
        if turn > 1:
            ratios.append(times["ours"] / times["theirs"])
            pairs.append([times["ours"], times["theirs"]])
    if rank.rank == 0:
        mean, half = interval(ratios)
        print(f"a step of 1F1B, {run.world} ranks, {count} micro-batches: ours {statistics.median(a for a, _ in pairs):.4f} s, torch "
              f"{statistics.median(b for _, b in pairs):.4f} s, ratio {mean:.3f} +- {half:.3f} over {len(ratios)} pairs")
        run.record(rank, {"ours_seconds_median": statistics.median(a for a, _ in pairs), "torch_seconds_median": statistics.median(b for _, b in pairs),
                          "ratio_mean": mean, "interval_ratio": half}, details={"pairs": pairs})


def convergence(run):
    """Mean loss of the last tenth of the micro-batches: each mode and learning rate on the same samples."""
    from pipedream.pipedream_simple import CONFIG as SIMPLE
    from pipedream.pipedream_simple import pipeline
    rank, measured, details = run.join(deepspeed=False), {}, {}
    for rate in map(float, run.settings["learning_rates"].split(",")):
        for mode in ("flush", "2bw", "stash", "naive", "vertical_sync"):
            # an update per micro-batch moves as far as one per step with a rate that is lower by as much
            each = rate if mode in ("flush", "2bw") else rate / run.settings["micro_batches"]
            settings = {**defaults(SIMPLE), "mode": mode, "steps": run.settings["steps"], "micro_batches": run.settings["micro_batches"],
                        "learning_rate": each, "layers": max(4, run.world), "hidden": 32, "seq": 32, "micro_batch": 1, "check": False}
            one = program.Run(run.name, settings, run.world, run.gpu, run.folder / f"{mode}_{rate:g}")
            found = pipeline(one, rank)
            if rank.rank == 0:
                losses = found["losses"]
                tail = losses[-max(1, len(losses) // 10):]
                if all(map(math.isfinite, losses)):                  # what diverged has no loss
                    measured[f"{mode}_{rate:g}_nats".replace(".", "_")] = statistics.mean(tail)
                window = max(1, len(losses) // 60)                   # the curve: means of windows
                curve = [statistics.mean(losses[k:k + window]) for k in range(0, len(losses) - window + 1, window)]
                details[f"{mode} {rate:g}"] = [loss if math.isfinite(loss) else None for loss in curve]
                print(f"rate {rate:g}  {mode:<14} loss {statistics.mean(tail):.4f}", flush=True)
    run.record(rank, measured, details=details)


def equality(run):
    """Weights and losses of every mode against one process, in float64: the distances that tests/pipedream holds to."""
    from pipedream.pipedream_simple import ASYNCHRONOUS, FLUSHING, pipeline
    from pipedream.pipedream_simple import CONFIG as SIMPLE
    from pipedream.pipedream_simple import check as allowed
    rank, rows, p = run.join(deepspeed=False), [], run.world
    cases = [{"mode": mode} for mode in (*ASYNCHRONOUS, "flush", "gpipe", *FLUSHING)]
    cases += [{"mode": mode, "replicas": "3,1", "micro_batches": 6} for mode in ("stash", "naive", "vertical_sync", "flush") if p == 4]
    for given in cases:
        chunks = 2 if given["mode"].startswith("interleaved") else None
        settings = {**defaults(SIMPLE), "micro_batches": 2 * p, "layers": 2 * p, "hidden": 16, "heads": 2, "seq": 8, "micro_batch": 1, "steps": 2,
                    "dtype": "float64", "chunks": chunks, **given}
        one = program.Run(run.name, settings, p, run.gpu, run.folder / f"{given['mode']}_{given.get('replicas', '')}")
        try:
            allowed(one)
        except SettingsError:                                        # not on this number of ranks
            continue
        if found := pipeline(one, rank):
            measured = found["measured"]
            rows.append([given["mode"], given.get("replicas"), measured["weights_apart_ratio_max"], measured["losses_apart_nats_max"],
                         measured["versions_count"]])
            print("{:<24} {!s:<6} weights differ by {:.1e}, losses by {:.1e}; versions {}".format(*rows[-1]), flush=True)
    if rank.rank == 0:
        run.record(rank, {"weights_apart_ratio_max": max(row[2] for row in rows), "losses_apart_nats_max": max(row[3] for row in rows),
                          "modes_count": len(rows)}, details={"rows": rows})


def profiles_of(settings):
    return program.ranks.ROOT / settings["profiles"]


def published(run):
    """What the planner makes of the authors' own profiles, where SOSP'19 table 1 gives a configuration."""
    from pipedream.graph import cuts, read_graph
    from pipedream.partitioner import partition
    rank, rows, graphs = run.join(deepspeed=False), [], {}
    for name, machines, bandwidths, paper in PUBLISHED:
        if name not in graphs:
            graphs[name] = cuts(read_graph(profiles_of(run.settings) / f"{name}.graph.txt"))
        for model, ratio in (("released", None), ("released", 1.0), ("paper", None), ("corrected", None)):
            plan = partition(graphs[name], list(machines), list(bandwidths), activation_compression_ratio=ratio, model=model)
            rows.append([name, list(machines), list(bandwidths), paper, model, ratio, "-".join(map(str, plan.replicas)), plan.time,
                         plan.data_parallel_time])
            print(f"{name:<9} {machines!s:<8} {model:<10} ratio {ratio!s:<5} {rows[-1][6]:<14} {plan.time:.4f} s, data parallel "
                  f"{plan.data_parallel_time / plan.time:.2f} times as long; paper: {paper or '-'}", flush=True)
    run.record(rank, {"plans_count": len(rows)}, details={"rows": rows})


def _timed(function):
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


if __name__ == "__main__":
    asked = [word.removeprefix("part=") for word in sys.argv if word.startswith("part=")] or ["simulator"]
    program.main(__file__, CONFIG, train, check, cpu_ranks=1 if asked[-1] in ALONE else 2)
