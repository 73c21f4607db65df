"""Records which functions of DeepSpeed each strategy enters, and prints the call-order tables of annotated_scripts/README.md.

    python strategies/call_order.py record=cpu2                # trains the tiny model on two CPU ranks under a call tracer
    python strategies/call_order.py table=zero2 label=cpu2

A record holds every Python function of the package that is entered inside initialize, forward, backward, step and
save_checkpoint, in the order of its first entry on rank 0, with the number of entries in each call of the five. A table shows
those of them that have an anchor (yardstick/deepspeed_map.json).
"""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from strategies.effective import FOLDERS
from yardstick import call_trace, deepspeed_map, ranks, results
from yardstick.deepspeed_source import Package
from yardstick.settings import Choice, Either, SettingsError, override, usage

CONFIG = {
    "strategy": Choice("all", *FOLDERS),  # which to record
    "record": Either(str),                # LABEL: write the records to results/LABEL/deepspeed_map/, else under runs/
    "table": Either(str),                 # print and run nothing: a strategy's calls; read: anchors that no strategy enters;
                                          # drift: how the anchors fare in older releases
    "label": "cpu2",                      # the tables are those of results/LABEL
}
PHASES = {"__init__.py:initialize": "initialize", "runtime/engine.py:DeepSpeedEngine.forward": "forward",
          "runtime/engine.py:DeepSpeedEngine.backward": "backward", "runtime/engine.py:DeepSpeedEngine.step": "step",
          "runtime/engine.py:DeepSpeedEngine.save_checkpoint": "save_checkpoint"}
# Three steps of two micro-batches: stage 3 records its module order in the first step and prefetches from the second on,
# and what happens at the boundary of accumulation only is told apart from what every micro-batch does.
RUN = {"model": "tiny", "precision": "bf16", "steps": 3, "accumulation": 2, "global_batch": 4, "seq": 32, "save_every": 3,
       "eval_batches": 0, "sample_tokens": 0, "count": False}
COMPILED = ("offload", "infinity")        # take DeepSpeed's C++ Adam, as users of offload do


def main():
    if text := usage(sys.argv[1:], __file__):
        print(text)
        return 0
    settings = override(CONFIG, sys.argv[1:], where="strategies/call_order.py")
    results.check_label(settings["record"])
    if settings["table"]:
        print(table(settings["table"], settings["label"]))
        return 0
    if ranks.is_rank():
        raise SettingsError("RANK is set: a launcher started this program. Start it as python strategies/call_order.py; it "
                            "starts the ranks of each run itself.")
    os.environ["RANKS"] = "2"
    ranks.use_cpu_accelerator()           # the same order on every machine, and autograd's hooks on a thread that is traced
    for strategy in FOLDERS if settings["strategy"] == "all" else [settings["strategy"]]:
        path, entered = record(strategy, settings["record"])
        print(f"{strategy}: {len(entered)} functions of DeepSpeed entered, {len(anchors_of(entered))} of them anchors; {path}")
    return 0


def record(strategy, label=None):
    """Train one strategy under the tracer and write its record -> (path, symbols entered)."""
    import real_model_example
    from strategies import checks
    from yardstick.settings import defaults
    chosen = {**defaults(real_model_example.CONFIG), **RUN, "strategy": strategy, "cpp_ops": strategy in COMPILED}
    os.environ.pop("RUN_STAMP", None)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        plan = checks.check(chosen)
    code = ranks.start(lambda: trace(plan), plan.world)
    if plan.swap:
        shutil.rmtree(plan.swap, ignore_errors=True)
    if code:
        sys.exit(f"call_order.py: {strategy} ended with exit code {code}.\n{said.getvalue()}")
    first, *others = (json.loads((plan.folder / f"calls_{rank}.json").read_text()) for rank in range(plan.world))
    entered = sorted({symbol for phase in first for each in (first, *others) for symbol in each[phase]})
    path = results.write(
        f"deepspeed_map/calls_{strategy}", label=label, folder=plan.folder, machine={"accelerator": "none", "ranks": plan.world},
        command=f"python strategies/call_order.py strategy={strategy}" + (f" record={label}" if label else ""),
        settings={**RUN, "strategy": strategy, "cpp_ops": chosen["cpp_ops"]}, predicted={},
        measured={"symbols_count": len(entered)},
        details={"entered": first, "on_other_ranks_only": {
            phase: sorted({symbol for other in others for symbol in other[phase]} - set(first[phase])) for phase in first}})
    return path.relative_to(results.ROOT), entered


def trace(plan):
    """One rank's run under the tracer; what it entered goes to the run's folder."""
    import real_model_example
    trace = call_trace.CallTrace(Package.at().folder, PHASES)
    with trace:
        real_model_example.train(plan, finish=False)
    plan.folder.mkdir(parents=True, exist_ok=True)
    entered = {name: trace.entered[name] for name in PHASES.values()}
    (plan.folder / f"calls_{os.environ['RANK']}.json").write_text(json.dumps(entered))


def anchors_of(entered):
    """{symbol as "file:symbol": name of its anchor} of those that have one."""
    known = {f"{file}:{symbol}": name for (file, symbol), name in deepspeed_map.places().items()}
    return {symbol: known[symbol] for symbol in entered if symbol in known}


def table(name, label="cpu2"):
    """The Markdown table that CONFIG's `table` names."""
    results.check_label(label)
    if name == "drift":
        return drift_table(label)
    if name == "read":
        return read_table(label)
    if name not in FOLDERS:
        raise SettingsError(f"table={name} is none of {', '.join([*FOLDERS, 'read', 'drift'])}.")
    found = results.read(f"deepspeed_map/calls_{name}", label)
    details, accumulation = found["details"], found["settings"]["accumulation"]
    rows = []
    for phase in PHASES.values():
        known = anchors_of(details["entered"][phase])
        for number, (symbol, times) in enumerate(details["entered"][phase].items()):
            if symbol not in known:
                continue
            if phase in ("initialize", "save_checkpoint"):
                cells = ["", "", str(sum(times))]
            else:
                times = times + [0] * (accumulation * RUN["steps"] - len(times))
                cells = [" + ".join(map(str, times[:accumulation])), " + ".join(map(str, times[-accumulation:])), str(sum(times))]
            rows.append((phase, known[symbol], symbol, *cells))
    lines = ["| in | anchor | symbol | first step | third step | all |", "|---|---|---|---|---|---|"]
    before = None
    for phase, anchor, symbol, *cells in rows:
        cells = [phase if phase != before else "", f"`ds:{anchor}`", f"`{symbol.replace(':', ': ')}`", *cells]
        lines.append(f"| {' | '.join(cells)} |")
        before = phase
    return "\n".join(lines)


def read_table(label):
    """The anchors that no strategy enters, why, and which annotated script enters them, by the records of their proofs."""
    proofs = {Path(one["run"]).name.removeprefix("proof_")[:2]: set(one["details"]["entered"])
              for one in results.read_all(label, "annotated_scripts") if "/proof_" in one["run"]}
    lines = ["| anchor | symbol | why no run above enters it | script that does |", "|---|---|---|---|"]
    for name, anchor in deepspeed_map.ANCHORS.items():
        if "read" in anchor:
            place = f"{anchor['file']}:{anchor['symbol']}"
            entering = [number for number, entered in proofs.items() if place in entered]
            lines.append(f"| `ds:{name}` | `{place.replace(':', ': ')}` | {deepspeed_map.REASONS[anchor['read']]} | {', '.join(entering)} |")
    return "\n".join(lines)


def drift_table(label):
    """How the anchors fare in older releases, by the records that `yardstick.deepspeed_map drift` left."""
    found = [one for one in results.read_all(label, "deepspeed_map") if one["run"].startswith("deepspeed_map/drift_")]
    lines = ["| release | verified | changed | moved or renamed | gone | without their landmark | begin on the same line | "
             "median shift, lines |", "|---|---|---|---|---|---|---|---|"]
    for one in sorted(found, key=lambda one: [int(part) for part in one["settings"]["release"].split(".")]):
        measured = one["measured"]
        cells = [one["settings"]["release"], *(measured[f"{key}_count"] for key in (
            "verified", "changed", "moved", "gone", "without_landmark", "same_first_line")), one["details"]["median_shift_lines"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SettingsError, FileNotFoundError) as error:
        sys.exit(f"strategies/call_order.py: {error}")
