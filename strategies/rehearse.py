"""Rehearses the loss of a rank: trains, kills one, resumes, and compares with the run that nobody disturbed.

    python strategies/rehearse.py                        # all six, some minutes on a laptop
    python strategies/rehearse.py strategies=zero3,infinity model=gpt2 steps=30
    python strategies/rehearse.py record=cpu2            # for commits: a record
    python strategies/rehearse.py table=cpu2             # print the table of that record again

Every run is the training program as a user starts it; the kill is SIGKILL to a rank's process.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from strategies.checkpoints import steps_in
from strategies.effective import FOLDERS
from yardstick import ranks, results
from yardstick.settings import Either, SettingsError, nearest, override, usage

CONFIG = {
    "strategies": ",".join(FOLDERS),      # names, separated by commas
    "model": "tiny",                      # as in real_model_example.py
    "steps": 12,                          # optimizer steps of the whole run
    "save_every": 4,                      # steps between checkpoints
    "kill_after": 6,                      # the step after which rank 1 is killed
    "ranks": 2,                           # of the run
    "other_ranks": 1,                     # the same checkpoint is also resumed on so many (not infinity, which keeps its ranks)
    "global_batch": 8,                    # sequences of one step
    "seq": 128,                           # tokens of a sequence
    "record": Either(str),                # LABEL: write results/LABEL/strategies/rehearsal.json
    "table": Either(str),                 # LABEL: print the table of that record and run nothing
}
SECONDS = 1800                            # that one run may take


def main():
    if text := usage(sys.argv[1:], __file__):
        print(text)
        return 0
    settings = override(CONFIG, sys.argv[1:], where="strategies/rehearse.py")
    if settings["table"]:
        results.check_label(settings["table"])
        print(table(results.read("strategies/rehearsal", settings["table"])))
        return 0
    names = settings["strategies"].split(",")
    for name in names:
        if name not in FOLDERS:
            raise SettingsError(f"strategies={name} is none of {', '.join(FOLDERS)}. Did you mean {nearest(name, FOLDERS)}?")
    if not 0 < settings["save_every"] <= settings["kill_after"] < settings["steps"]:
        raise SettingsError("save_every must be at most kill_after, and kill_after less than steps: a checkpoint is resumed from.")
    if settings["ranks"] < 2:
        raise SettingsError(f"ranks={settings['ranks']}: rank 1 is killed, so there must be two at least.")
    results.check_label(settings["record"])
    home = ROOT / "runs" / "rehearsal" / time.strftime("%Y%m%d-%H%M%S")
    rows = {}
    for name in names:
        print(f"{name}: a whole run, a killed one, a resumed one", file=sys.stderr, flush=True)
        rows[name] = rehearse(name, settings, home / name)
    measured = {f"{name}_{key}": value for name, row in rows.items() for key, value in row.items() if value is not None}
    predicted = {key: measured.pop(key) for key in [k for k in measured if k.endswith("predicted_bytes")]}
    path = results.write("strategies/rehearsal", settings=settings, measured=measured,
                         predicted={key.replace("_predicted", "_checkpoint"): value for key, value in predicted.items()},
                         machine={"accelerator": ranks.gpu_name() if ranks.gpu_count() else "none", "ranks": settings["ranks"]}, details={"rows": rows}, label=settings["record"], folder=home)
    print(table(json.loads(Path(path).read_text())))
    print(f"record: {path.relative_to(ROOT)}")
    return 0


def rehearse(strategy, settings, folder):
    """Four runs of one strategy; what came of them."""
    common = [f"strategy={strategy}", *(f"{key}={settings[key]}" for key in ("model", "steps", "save_every", "global_batch", "seq")),
              "keep=99", "eval_batches=0", "sample_tokens=0"]
    start([*common, f"output={folder / 'whole'}"], settings["ranks"])
    lost, begin = kill([*common, f"output={folder / 'killed'}"], settings)
    ended = time.monotonic() - begin
    done = steps_in(folder / "killed" / "checkpoints")
    manifest = json.loads((done[-1] / "manifest.json").read_text())
    start([f"strategy={strategy}", "resume=auto", f"output={folder / 'killed'}"], settings["ranks"])
    whole, resumed = (losses(folder / run) for run in ("whole", "killed"))
    other = None
    if strategy != "infinity":
        start([f"strategy={strategy}", f"resume={done[-1]}", f"output={folder / 'other'}"], settings["other_ranks"])
        other = max(abs(a - b) for a, b in zip(whole, losses(folder / "other"), strict=True))
    from yardstick import deepspeed_memory
    return {"checkpoint_bytes": manifest["bytes"], "save_seconds": manifest["seconds"], "ended_seconds": round(ended, 2),
            "lost_steps": lost - manifest["step"], "resumed_loss_difference_nats": max(abs(a - b) for a, b in zip(whole, resumed, strict=True)),
            "other_ranks_loss_difference_nats": other,
            "predicted_bytes": deepspeed_memory.checkpoint_bytes(tensors(manifest), manifest["config"])}


def tensors(manifest):
    from strategies import models
    return models.tensors_of(models.configuration({**manifest["settings"]}, gpu=False)[0])


def start(words, count, wait=True):
    """The training program with `count` ranks, as a process; ended well unless wait=False."""
    environment = {**os.environ, "RANKS": str(count)}
    process = subprocess.Popen([sys.executable, str(ROOT / "real_model_example.py"), *words], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if wait:
        said, _ = process.communicate(timeout=SECONDS)
        if process.returncode:
            raise SystemExit(f"rehearse.py: {' '.join(words)} ended with exit code {process.returncode}:\n{said[-3000:]}")
    return process


def kill(words, settings):
    """(steps done, when) of a run whose rank 1 was killed after a step; asserts that the run ended because of it."""
    import psutil
    process = start(words, settings["ranks"], wait=False)
    log, killed = [], None
    for line in process.stdout:
        log.append(line)
        done = [text for text in log if text.startswith(f"step {settings['kill_after']}/")]
        if done and killed is None:
            victims = sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
            killed = time.monotonic()
            os.kill(victims[1].pid, signal.SIGKILL)
    code = process.wait(SECONDS)
    if code != 128 + signal.SIGKILL or "rank 1 of" not in "".join(log):
        raise SystemExit(f"rehearse.py: rank 1 was killed, and the run ended with exit code {code}:\n{''.join(log)[-3000:]}")
    return settings["kill_after"], killed


def losses(folder):
    return json.loads((folder / "record.json").read_text())["details"]["loss"]


def table(record):
    """Markdown: what each strategy's checkpoint takes, and how exactly the run went on."""
    settings = record["settings"]
    lines = [f"{settings['model']}, {settings['ranks']} ranks, {settings['steps']} steps, a checkpoint every {settings['save_every']}, rank 1 "
             f"killed after step {settings['kill_after']}:", "",
             f"| strategy | checkpoint, MB | predicted, MB | written in, s | run ended after, s | steps lost | loss apart, resumed | on "
             f"{settings['other_ranks']} rank{'s' if settings['other_ranks'] > 1 else ''} |", "|---|" + "---:|" * 7]
    for name, row in record["details"]["rows"].items():
        apart, other = row["resumed_loss_difference_nats"], row["other_ranks_loss_difference_nats"]
        lines.append(f"| {name} | {row['checkpoint_bytes'] / 1e6:.1f} | {row['predicted_bytes'] / 1e6:.1f} | {row['save_seconds']:.2f} | "
                     f"{row['ended_seconds']:.1f} | {row['lost_steps']} | {'0, every bit' if apart == 0 else f'{apart:.1e}'} | "
                     f"{'keeps its ranks' if other is None else f'{other:.1e}'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SettingsError, ValueError, FileNotFoundError) as error:
        sys.exit(f"rehearse.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
