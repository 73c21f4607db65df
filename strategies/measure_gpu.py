"""Measures all six strategies on the GPUs of this machine: time, allocator's peak and ledger, and how large a model each fits.

    bash strategies/measure_gpu.sh                               # results/<GPU>x<number>/strategies/gpu/*.json
    bash strategies/measure_gpu.sh models=gpt2-xl strategies=zero2,zero3 largest=False
    python strategies/measure_gpu.py table=h200x1                # the table of committed records; all: of every machine
    DS_ACCELERATOR=cpu python strategies/measure_gpu.py output=runs/rehearsal models=tiny ladder=2x64,2x128 memory=0.3

Each run is a process of its own with a time limit. Running out of memory is an outcome, which is recorded like a time. A run
that has a record is not repeated, so a measurement that was interrupted goes on where it was; one that failed is.
"""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from strategies import effective, gpu_models
from yardstick import formulas, ranks, results, shapes
from yardstick.settings import Either, SettingsError, defaults, nearest, override

CONFIG = {
    "models": "gpt2-medium,gpt2-large",   # names or folders, as model= of real_model_example.py
    "strategies": ",".join(effective.FOLDERS),
    "steps": 20,                          # of each run
    "micro_batch": 4,                     # sequences of one forward on one GPU; there is one forward a step
    "seq": Either(int),                   # tokens of a sequence; None: 1024 on a GPU, 32 on a CPU
    "activation_checkpointing": False,    # keep each layer's input only
    "largest": True,                      # look for the largest model that each strategy fits
    "largest_steps": 6,                   # of each run of that search; it takes micro_batch=1 and activation checkpointing
    "ladder": "auto",                     # its models, LAYERSxHIDDEN with commas; auto: 24x1536, 28x1792, ... 96x6144
    "memory": Either(float),              # GB (1e9 bytes) of a device; None: what the GPU has; on a CPU a limit that each rank is held to
    "seconds": 600.0,                     # limit of one run
    "cpp_ops": False,                     # DeepSpeed's compiled Adam in place of torch's
    "record": Either(str),                # label; None: the GPU's name and number, h200x1
    "output": Either(str),                # folder for the records, in place of results/LABEL/strategies/gpu
    "table": Either(str),                 # LABEL: print the table of results/LABEL and run nothing; all: of all machines
    "one": Either(str),                   # used by the program itself: STRATEGY MODEL NAME, one run in this process
}
NO_MEMORY = re.compile(r"OutOfMemoryError|out of memory|can't allocate memory|Cannot allocate memory|MemoryError|ended by SIGKILL")
OF_A_RUN = ("steps", "micro_batch", "seq", "activation_checkpointing", "cpp_ops")
NOT_RUN = "not run: no GPU was at hand"


def main():
    settings = override(CONFIG, sys.argv[1:], where="strategies/measure_gpu.py")
    if settings["table"]:
        print(tables(settings["table"]))
        return 0
    gpu = ranks.gpu_count() > 0
    settings["seq"] = settings["seq"] or (1024 if gpu else 32)
    if settings["one"]:
        return one(*settings["one"].split(), settings)
    chosen = settings["strategies"].split(",")
    for name in chosen:
        if name not in effective.FOLDERS:
            raise SettingsError(f"strategies={settings['strategies']}: {name} is none of {', '.join(effective.FOLDERS)}. "
                                f"Did you mean {nearest(name, effective.FOLDERS) or 'zero2'}?")
    if not gpu and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise SettingsError(f"nothing was measured: torch {_torch_version()} finds no GPU here. Start it on a machine that has one, with "
                            "a torch built for it (TORCH_BUILD=cuda, or PYTHON=); DS_ACCELERATOR=cpu output=FOLDER rehearses on the CPU.")
    if not gpu and not settings["output"]:
        raise SettingsError("a rehearsal on the CPU is no measurement of a GPU: give output=FOLDER for its records.")
    machine = machine_of(gpu, settings)
    words = [word for word in sys.argv[1:] if not word.startswith("output=")]
    os.environ["MEASURE_GPU"] = shlex.join(["bash", "strategies/measure_gpu.sh", *words])        # the command of the records
    settings["record"] = settings["record"] or machine["label"]
    results.check_label(settings["record"])
    settings["machine"] = {"accelerator": machine["name"] if gpu else "none", "ranks": machine["count"]}
    print(f"{machine['count']} x {machine['name']}, {machine['device'] / 1e9:.1f} GB each; records: {_folder(settings)}", flush=True)
    outcomes = [measure(strategy, model, f"{Path(model).name}_{strategy}", settings)
                for model in filter(None, settings["models"].split(",")) for strategy in chosen]
    if settings["largest"]:
        outcomes += [outcome for strategy in chosen for outcome in search(strategy, settings, machine, gpu)]
    shown = records(_folder(settings))
    print(table(shown) if shown else "no run has a record")
    return 1 if "failed" in outcomes else 0


def machine_of(gpu, settings):
    """{"name", "count", "label", "device", "host", "disk": bytes}. CUDA is asked in another process: a context takes memory."""
    import psutil
    count, name, device = ranks.default_world(), "CPU process", psutil.virtual_memory().total / ranks.default_world()
    if gpu:
        code = "import torch; p = torch.cuda.get_device_properties(0); print(p.name); print(p.total_memory)"
        name, device = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")[:2]
    label = re.sub("[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-") + f"x{count}"
    return {"name": name, "count": count, "label": label, "device": (settings["memory"] or 0) * 1e9 or float(device),
            "host": psutil.virtual_memory().total, "disk": shutil.disk_usage(results.ROOT).free}


def search(strategy, settings, machine, gpu):
    """Outcomes of the runs that find the largest model a strategy fits: from the largest predicted to fit, up or down."""
    settings = {**settings, "steps": settings["largest_steps"], "micro_batch": 1, "activation_checkpointing": True}
    ladder, outcomes, step = gpu_models.ladder_of(settings["ladder"]), [], None
    at = max((k for k, shape in enumerate(ladder) if _fits(shape, strategy, settings, machine, gpu)), default=0)
    while 0 <= at < len(ladder):
        name = gpu_models.name_of(ladder[at])
        folder = results.ROOT / gpu_models.FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(shapes.config_json(ladder[at]), indent=1))
        outcomes.append(measure(strategy, f"{gpu_models.FOLDER}/{name}", f"{name}_{strategy}", settings))
        direction = 1 if outcomes[-1] == "ok" else -1
        if step not in (None, direction) or outcomes[-1] == "failed":
            break                                            # one fits and the next does not
        step, at = direction, at + direction
    return outcomes


def _fits(shape, strategy, settings, machine, gpu):
    config = gpu_models.config_of(shape, strategy, machine["count"], gpu, settings["cpp_ops"])
    bytes_of = gpu_models.needed(shape, config, machine["count"], gpu, micro_batch=1, seq=settings["seq"], recompute="full")
    return bytes_of["device"] <= 0.97 * machine["device"] and bytes_of["disk"] <= 0.9 * machine["disk"] and (
        not gpu or bytes_of["host"] <= 0.9 * machine["host"])


def measure(strategy, model, name, settings):
    """Run one strategy on one model, unless that has a record; return its outcome: ok, out of memory, timed out or failed."""
    path = _folder(settings) / f"{name}.json"
    if path.exists():
        outcome = json.loads(path.read_text())["outcome"]
        print(f"{name}: {outcome}, recorded before", flush=True)
        return outcome
    words = [sys.executable, __file__, f"one={strategy} {model} {name}",
             *(f"{key}={settings[key]}" for key in (*OF_A_RUN, "memory", "record", "output"))]
    log = results.ROOT / gpu_models.FOLDER / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with open(log, "w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = process.wait(settings["seconds"])
        except subprocess.TimeoutExpired:
            code = None
        finally:                                             # its ranks too, also when this program is interrupted
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    outcome = outcome_of(code, log.read_text(errors="replace"))
    if outcome in ("out of memory", "timed out"):
        results.write(f"strategies/gpu/{name}", outcome=outcome, measured={}, predicted={}, command=os.environ["MEASURE_GPU"],
                      machine=settings["machine"],
                      settings={"strategy": strategy, "model": model, **{key: settings[key] for key in OF_A_RUN}},
                      details={"limit_seconds": settings["seconds"]} if outcome == "timed out" else {}, **_target(settings, name))
    if settings["output"] and outcome != "failed":
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(_target(settings, name)["folder"] / "record.json", path)
    said = f"; its messages: {log.relative_to(results.ROOT)}" if outcome == "failed" else ""
    print(f"{name}: {outcome} ({time.monotonic() - begin:.0f} s){said}", flush=True)
    return outcome


def outcome_of(code, text):
    """What became of a run with this exit code (None: it was ended at its limit) and these messages.

    >>> outcome_of(0, ""), outcome_of(None, ""), outcome_of(1, "torch.OutOfMemoryError: CUDA out of memory."), outcome_of(1, "no")
    ('ok', 'timed out', 'out of memory', 'failed')
    """
    if not code:
        return "ok" if code == 0 else "timed out"
    killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL)     # by the kernel, when the host's memory is used up
    return "out of memory" if killed or NO_MEMORY.search(text) else "failed"


def one(strategy, model, name, settings):
    """One run in this process and its ranks, recorded as strategies/gpu/NAME."""
    import real_model_example
    from strategies import checks
    target = _target(settings, name)
    plan = checks.check({**defaults(real_model_example.CONFIG), **{key: settings[key] for key in OF_A_RUN}, "strategy": strategy,
                         "model": model, "eval_batches": 0, "sample_tokens": 0, "record": target["label"]})
    plan.run, plan.command, plan.brief = f"strategies/gpu/{name}", os.environ["MEASURE_GPU"], True
    plan.folder = target["folder"] or plan.folder
    if ranks.is_rank():                   # on a GPU each rank is this program again
        return real_model_example.train(plan)["code"]
    if settings["memory"] and not plan.gpu:
        _hold_to(settings["memory"] * 1e9)
    try:
        return ranks.start(lambda: sys.exit(real_model_example.train(plan)["code"]), plan.world, gpu=plan.gpu)
    finally:
        if plan.swap:
            shutil.rmtree(plan.swap, ignore_errors=True)


def _hold_to(nbytes):
    """Let this process, and each that it forks, allocate so much beyond what it has (Linux)."""
    import psutil
    limit = psutil.Process().memory_info().data + int(nbytes)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _folder(settings):
    """Where the records go, absolute."""
    if settings["output"]:
        return Path(settings["output"]).resolve()
    return results.ROOT / "results" / settings["record"] / "strategies" / "gpu"


def _target(settings, name):
    """label and folder of results.write."""
    return {"label": None if settings["output"] else settings["record"],
            "folder": results.ROOT / gpu_models.FOLDER / f"{name}.run" if settings["output"] else None}


def _torch_version():
    import torch
    return torch.__version__


def records(folder):
    """The records of a folder, by name."""
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def tables(label):
    """The tables of results/LABEL, or of every machine with such records; what is not there was not run."""
    if label != "all":
        results.check_label(label)
    found = sorted((results.ROOT / "results").glob(f"{'*' if label == 'all' else label}/strategies/gpu"))
    return "\n\n".join(table(records(folder)) for folder in found) or NOT_RUN


def table(found):
    """Markdown: a line for each run."""
    first = found[0]
    lines = [f"{first['machine']['ranks']} x {first['machine']['accelerator']}, torch {first['versions'].get('torch', '?')}, DeepSpeed "
             f"{first['versions'].get('deepspeed', '?')}, commit {first.get('commit', '?')[:10]}; `{first['command']}`. GB = 10^9 bytes of one device; "
             "ledger: what the engine holds after backward, and activations at their peak.", "",
             "| model | parameters, M | strategy | batch | ms/step | epoch, s | tokens/s | ledger + activations, GB | allocator's peak, GB | "
             "predicted peak, GB |", "|---|---:|---|---:|" + "---:|" * 6]
    order = list(effective.FOLDERS)
    for record in sorted(found, key=lambda r: (_parameters(r), order.index(r["settings"]["strategy"]))):
        got, settings = record["measured"], record["settings"]
        cells = [Path(settings["model"]).name, f"{_parameters(record) / 1e6:,.0f}", settings["strategy"],
                 f"{settings['micro_batch']} x {settings['seq']}" + (" *" if settings["activation_checkpointing"] else "")]
        if record["outcome"] != "ok":
            cells += [record["outcome"], *["-"] * 5]
        else:
            cells += [f"{1e3 * got['step_seconds_median']:,.0f}", _number(got.get("epoch_seconds"), 1, 0), f"{got['tokens_per_second']:,.0f}",
                      f"{got['device_bytes'] / 1e9:.2f} + {got.get('activation_bytes', 0) / 1e9:.2f}", _number(got.get("peak_allocated_bytes")),
                      _number(_predicted(record))]
        lines.append(f"| {' | '.join(cells)} |")
    if any(record["settings"]["activation_checkpointing"] for record in found):
        lines += ["", "\\* with activation checkpointing: the search for the largest model that fits."]
    return "\n".join(lines)


def _number(value, unit=1e9, digits=2):
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def _shape(record):
    return gpu_models.shape_of(Path(record["settings"]["model"]).name)


def _parameters(record):
    return record["details"].get("parameters") or (formulas.param_count(_shape(record)) if _shape(record) else 0)


def _predicted(record):
    """Bytes that deepspeed_peak predicts for one device; None for a model of another family."""
    settings, machine = record["settings"], record["machine"]
    return _shape(record) and gpu_models.needed(
        _shape(record), record["details"]["config"], machine["ranks"], machine["accelerator"] != "none", micro_batch=settings["micro_batch"],
        seq=settings["seq"], recompute="full" if settings["activation_checkpointing"] else "none")["device"]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SettingsError, ValueError) as error:
        sys.exit(f"measure_gpu.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
