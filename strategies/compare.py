"""Runs all six strategies on the same model, data, seed and global batch, and puts them side by side.

    python strategies/compare.py                     # both precisions: eleven runs, some minutes on a laptop
    python strategies/compare.py precision=bf16 steps=10
    python strategies/compare.py record=cpu2 commit=True       # for commits: records, figures
    python strategies/compare.py table=cpu2                    # print the table of committed records again

The libraries are imported once; each run gets fresh ranks, because a ZeRO-3 engine is never freed inside its process.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from strategies.effective import FOLDERS
from yardstick import results
from yardstick.settings import Choice, Either, SettingsError, override, usage

CONFIG = {
    "model": "tiny",                      # as in real_model_example.py
    "steps": 20,                          # optimizer steps of each run
    "global_batch": 8,                    # sequences of one step, over all ranks
    "seq": 128,                           # tokens of a sequence
    "gradient_clipping": 0.0,             # off: ZeRO and plain data parallelism round the clipping factor differently,
                                          # and Adam makes much of that where a gradient is next to nothing
    "seed": 1,                            # of weights and data
    "precision": Choice("both", "fp32", "bf16"),   # infinity runs in bf16 only
    "record": Either(str),                # LABEL: write the records to results/LABEL/strategies/compare/
    "commit": False,                      # draw the figures into strategies/images/
    "table": Either(str),                 # LABEL: print the table of results/LABEL and run nothing
    "draw": Either(str),                  # LABEL: draw the figures of results/LABEL and run nothing
}
CASES = [(strategy, precision) for precision in ("fp32", "bf16") for strategy in FOLDERS
         if (strategy, precision) != ("infinity", "fp32")]
PICTURES = {                              # who holds what: whole on each rank, or its share, and where
    "dp": {"parameter": "full", "gradient": "full", "master": "full", "optimizer": "full"},
    "zero1": {"parameter": "full", "gradient": "full", "master": "sharded", "optimizer": "sharded"},
    "zero2": {"parameter": "full", "gradient": "sharded", "master": "sharded", "optimizer": "sharded"},
    "zero3": {"parameter": "sharded", "gradient": "sharded", "master": "sharded", "optimizer": "sharded"},
    "offload": {"parameter": "full", "gradient@host": "sharded", "master@host": "sharded", "optimizer@host": "sharded"},
    "infinity": {"gradient@host": "sharded", "parameter@nvme": "sharded", "master@nvme": "sharded",
                 "optimizer@nvme": "sharded"},
}
TITLES = {"dp": "Data parallel: every rank holds everything", "zero1": "ZeRO-1: each rank keeps its share of the optimizer",
          "zero2": "ZeRO-2: of the optimizer and the gradients",
          "zero3": "ZeRO-3: of optimizer, gradients and weights",
          "offload": "ZeRO-Offload: ZeRO-2 with the optimizer on the host",
          "infinity": "ZeRO-Infinity: ZeRO-3 with weights and optimizer in files"}


def main():
    if text := usage(sys.argv[1:], __file__):
        print(text)
        return 0
    settings = override(CONFIG, sys.argv[1:], where="strategies/compare.py")
    if settings["table"]:
        print(table(records_of(settings["table"])))
        return 0
    if settings["draw"]:
        return draw(records_of(settings["draw"]), settings["commit"])
    from yardstick import ranks
    if ranks.is_rank() and "COMPARE_CASE" not in os.environ:
        raise SettingsError("RANK is set: a launcher started this program. Start it as python strategies/compare.py; it "
                            "starts the ranks of each run itself.")
    if ranks.is_rank():                   # on a GPU each rank is this program again
        return train(plan_of(*os.environ["COMPARE_CASE"].split(), settings))
    cases = [case for case in CASES if settings["precision"] in ("both", case[1])]
    records, begin = {}, time.monotonic()
    for number, (strategy, precision) in enumerate(cases, 1):
        os.environ["COMPARE_CASE"] = f"{strategy} {precision}"
        with contextlib.redirect_stderr(io.StringIO()) as said:          # each run's start is told in one line below
            try:
                plan = plan_of(strategy, precision, settings)
            finally:
                notes = [line for line in said.getvalue().splitlines() if "building" in line]
        print(f"[{number}/{len(cases)}] {strategy} {precision}, {plan.world} ranks ({time.monotonic() - begin:.0f} s so far)",
              *notes, sep="\n", file=sys.stderr, flush=True)
        code = ranks.start(lambda: train(plan), plan.world, gpu=plan.gpu)
        if plan.swap:
            shutil.rmtree(plan.swap, ignore_errors=True)
        if code:
            sys.exit(f"compare.py: {strategy} {precision} ended with exit code {code}; its messages are above.")
        record = results.ROOT / "results" / str(settings["record"]) / f"{plan.run}.json"
        records[strategy, precision] = json.loads((record if settings["record"] else plan.folder / "record.json").read_text())
        os.environ.pop("RUN_STAMP", None)
    print(table(records))
    return draw(records, settings["commit"])


def plan_of(strategy, precision, settings):
    """The Plan of one run: that of real_model_example.py with the settings all runs share."""
    import real_model_example
    from strategies import checks
    from yardstick.settings import defaults
    chosen = {**defaults(real_model_example.CONFIG), "strategy": strategy, "precision": precision, "eval_batches": 0,
              "sample_tokens": 0, **{key: settings[key] for key in ("model", "steps", "global_batch", "seq", "seed", "gradient_clipping",
                                                                            "record")}}
    plan = checks.check(chosen)
    plan.run = f"strategies/compare/{strategy}_{precision}"
    plan.folder = results.ROOT / "runs" / plan.run / plan.folder.name
    plan.command = results.shown_command()
    plan.brief = True
    return plan


def train(plan):
    import real_model_example
    real_model_example.train(plan)


def records_of(label):
    """{(strategy, precision): record} of the committed comparison on one machine."""
    results.check_label(label)
    found = {case: results.ROOT / "results" / label / "strategies" / "compare" / "{}_{}.json".format(*case) for case in CASES}
    found = {case: path for case, path in found.items() if path.exists()}
    if not found:
        raise SettingsError(f"results/{label}/strategies/compare/ has no records. Write them by python strategies/compare.py "
                            f"record={label}.")
    return {case: results.read("strategies/compare/{}_{}".format(*case), label) for case in found}


def table(records):
    """Markdown: memory after backward by kind and place, traffic, time and loss of each run."""
    lines = []
    for precision in ("fp32", "bf16"):
        rows = {strategy: record for (strategy, p), record in records.items() if p == precision}
        if not rows:
            continue
        first = next(iter(rows.values()))
        what = {"fp32": "fp32", "bf16": "bf16 with fp32 master weights"}[precision]
        lines += [f"{what}, {first['settings']['model']} ({first['details']['parameters']:,} parameters), "
                  f"{first['machine']['ranks']} ranks, global batch {first['settings']['global_batch']} x "
                  f"{first['settings']['seq']} tokens; MB = 10^6 bytes per rank after backward:", "",
                  "| strategy | weights | gradients | master | Adam | buffers | on device | on host | in files | paper | "
                  "sent, P | ms/step | loss |",
                  "|---|" + "---:|" * 12]
        for strategy, record in rows.items():
            got, memory = record["measured"], record["details"]["memory"]["after_backward"]
            unit = record["details"]["traffic"]["weights_bytes"] * (1 - 1 / record["machine"]["ranks"])
            cells = [_mb(got.get(f"{key}_bytes", 0)) for key in ("parameter", "gradient", "master", "optimizer", "buffer",
                                                                 "device", "host", "nvme")]
            cells += [_mb(sum(memory["paper"].values())), f"{got['ring_bytes'] / unit:.2f}" if unit else "-",
                      f"{1e3 * got['step_seconds_median']:.0f}", f"{got['loss_nats']:.6f}"]
            lines.append(f"| {strategy} | " + " | ".join(cells) + " |")
        lines += ["", _agreement(rows, precision), ""]
    return "\n".join(lines).rstrip()


def _agreement(rows, precision):
    # in bf16 data parallelism computes something else (1_data_parallel/README.md), so the others are held to zero1
    first = "zero1" if precision == "bf16" and "zero1" in rows else next(iter(rows))
    others = [name for name in rows if name != first]
    base = rows[first]["details"]["loss"]
    gaps = {name: max(abs(a - b) for a, b in zip(rows[name]["details"]["loss"], base)) for name in others}
    words = ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())
    return f"Largest distance of a step's loss from {first}'s over {len(base)} steps, {precision}: {words}."


def _mb(nbytes):
    return f"{nbytes / 1e6:.1f}" if nbytes else "-"


def draw(records, commit):
    """Memory, traffic and loss of all runs, and with commit=True the pictures of who holds what."""
    from yardstick import figures
    figures.style()
    folder = results.ROOT / ("strategies/images" if commit else "runs/figures/strategies")
    paths = []

    def place(name):
        paths.append(folder / f"{name}.png")
        return paths[-1]

    memory_of = max((p for _, p in records), key=lambda p: sum(q == p for _, q in records))    # the fuller precision
    chosen = {s: r for (s, p), r in records.items() if p == memory_of}
    memory = {s: r["details"]["memory"]["after_backward"] for s, r in chosen.items()}
    sent = {s: r["details"]["traffic"] for s, r in chosen.items()}
    anyone = next(iter(chosen.values()))
    facts = f"{anyone['settings']['model']}, {anyone['machine']['ranks']} ranks, {memory_of}"
    figures.memory_bars(place("memory"), *({s: m[name] for s, m in memory.items()} for name in ("measured", "predicted", "paper")),
                        title=f"Memory of one rank after backward ({facts})")
    unit = anyone["details"]["traffic"]["weights_bytes"] * (1 - 1 / anyone["machine"]["ranks"])
    if unit:
        figures.traffic_bars(place("traffic"), *({s: t[name] for s, t in sent.items()} for name in ("measured", "predicted")),
                             P=unit, title=f"Sent by one rank in a step ({facts})")
    # the five in fp32 on top of each other; beside them what runs in bf16 only, and data parallelism there
    curves = {f"{s} {p}": r["details"]["loss"] for (s, p), r in records.items() if p == "fp32" or s in ("infinity", "dp")
              or ("dp", "fp32") not in records}
    figures.curves(place("loss"), curves, title=f"Training loss ({anyone['settings']['model']}, {anyone['machine']['ranks']} ranks)")
    if commit:
        recipe = {"parameter": 2, "gradient": 2, "master": 4, "optimizer": 8}         # the ZeRO paper's mixed precision
        for strategy, rows in PICTURES.items():
            figures.who_holds_what(place(FOLDERS[strategy]), 4, rows, weights=recipe, title=TITLES[strategy] + " (bytes as in the paper)")
    for path in paths:
        print(f"figure: {path.relative_to(results.ROOT)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SettingsError, ValueError, FileNotFoundError) as error:
        sys.exit(f"compare.py: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"compare.py: this Python ({sys.executable}) has no module {error.name}. Start by strategies/3_zero_stage2/run.sh, which "
                 "makes what is missing, or run `source env.sh` first, or pip install -r requirements.txt.")
    except KeyboardInterrupt:
        sys.exit(130)
