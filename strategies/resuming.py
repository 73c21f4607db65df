"""Which checkpoint a run continues from, and whether it may: decided before any rank starts."""

import hmac
import json
from dataclasses import dataclass
from pathlib import Path

from strategies import effective
from strategies.checkpoints import PATHS, absolute, digest, seal, shape_of, shown, steps_in
from yardstick.settings import SettingsError

ROOT = Path(__file__).resolve().parent.parent
# Settings on which the losses depend: a resumed run keeps them.
SAME = ("strategy", "model", "pretrained", "data", "tokenizer", "seed", "learning_rate", "schedule", "warmup_steps",
        "gradient_clipping", "precision", "seq", "global_batch")
# Settings that belong to one start of the program, and are not taken over from the run that is resumed.
OWN = ("resume", "trust", "export", "output", "record", "nvme_path", "timeout_seconds", "count")
# Keys of the DeepSpeed config that may differ: the batch is compared as a whole, paths are this start's.
FREE = {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "checkpoint", "nvme_path"}


@dataclass
class Resume:
    """A checkpoint that this run continues from."""

    path: Path                  # of the step's folder
    manifest: dict
    convert: bool = False       # to a universal checkpoint: the number of ranks differs

    @property
    def step(self):
        return self.manifest["step"]


def find(settings, given, world, say=print):
    """The Resume that settings["resume"] asks for, or None; `settings` gets what the run had and `given` does not name.

    given: names of the settings that the user gave; say: is told why auto begins anew. Raises SettingsError for a
    checkpoint that is none, is not complete, or contradicts what was given.
    """
    wanted = settings["resume"]
    if settings["trust"] and not Path(settings["trust"]).is_dir():
        raise SettingsError(f"trust={settings['trust']} is no folder. Give that of the checkpoint that you trust.")
    if wanted == "none":
        return None
    if wanted != "auto":
        path = _named(Path(wanted).resolve())
        found = Resume(path, read(path, settings["trust"]))
        differs = _contradictions(found.manifest, settings, given)
        if differs:
            raise SettingsError(f"resume={wanted}: {differs}. A resumed run keeps what its losses depend on: leave that out, or "
                                "start anew with resume=none.")
        _take_over(found.manifest, settings, given, world)
        return _of(found, world)
    base = Path(settings["output"]).resolve() if settings["output"] else None
    home = ROOT / "runs" / "strategies" / effective.FOLDERS[settings["strategy"]]
    runs = [steps_in(folder) for folder in ([base / "checkpoints"] if base else home.glob("*/checkpoints"))]
    newest = [steps[-1] for steps in runs if steps]          # of each run
    reason = f"there is no checkpoint under {shown(base or home)}"
    for path in sorted(newest, key=lambda p: (p / "manifest.json").stat().st_mtime_ns, reverse=True):
        try:
            manifest = read(path, settings["trust"])
        except SettingsError as error:
            if base:
                raise
            say(f"resume=auto: left out: {error}")
            continue
        differs = _contradictions(manifest, settings, given)
        if not differs:
            _take_over(manifest, settings, given, world)
            if manifest["step"] >= settings["steps"] and not settings["export"]:
                say(f"resume=auto: nothing is left to do: {shown(path)} is of step {manifest['step']}, and steps={settings['steps']}. "
                    "Give more steps=, or export=FOLDER to write the model.")
                raise SystemExit(0)                          # no fault: a job that is started again ends well
            settings["output"] = str(path.parent.parent)     # the run goes on where it was
            return _of(Resume(path, manifest), world)
        if base:
            raise SettingsError(f"resume=auto: {shown(path)} belongs to another run: {differs}. Give another output=, or remove "
                                "that folder to start anew there.")
        if reason.startswith("there is"):
            reason = f"the newest checkpoint, {shown(path)}, is of another run: {differs}"
    settings["resume"] = "none"
    say(f"resume=auto: {reason}; this run begins at step 1")
    return None


def _of(resume, world):
    """`resume`, unless it cannot be continued by this many ranks."""
    saved = resume.manifest["world"]
    if resume.manifest["resolved"].get("strategy") == "infinity" and saved != world:
        raise SettingsError(f"{resume.path} was written by {saved} ranks and this run has {world}. strategy=infinity keeps its ranks: "
                            f"DeepSpeed cannot cut NVMe shares anew. Start with RANKS={saved}.")
    return resume


def _named(path):
    """The checkpoint that a user means: a step's folder, a run's folder, or its folder of checkpoints (the newest)."""
    if (path / "manifest.json").is_file():
        return path
    inside = steps_in(path / "checkpoints") or steps_in(path)
    if not inside:
        what = "does not exist" if not path.exists() else "holds no checkpoint of this program (no manifest.json)"
        raise SettingsError(f"resume={path} {what}. Give the folder of a run, or of one of its steps. Weights from elsewhere come in "
                            "as safetensors: model=FOLDER pretrained=True.")
    return inside[-1]


def read(path, trust=None):
    """The manifest of a checkpoint, after checking that this program sealed it and that all its files have their sizes.

    trust: a path; a checkpoint with another seal is read only when that names it.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files, sealed = manifest["files"], str(manifest["seal"]).encode()
        types = {"files": dict, "step": int, "settings": dict, "resolved": dict, "world": int, "data": str, "model": dict, "config": dict,
                 "loss": list}
        wrong = [key for key, kind in types.items() if not isinstance(manifest[key], kind)]
        if wrong or not all(isinstance(entry, list) and len(entry) == 2 for entry in files.values()):
            raise ValueError(f"{(wrong or ['files'])[0]} is not what is written there")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SettingsError(f"{path} is damaged: its manifest.json cannot be read ({type(error).__name__}: {error}). "
                            + _instead(path)) from None
    if not hmac.compare_digest(sealed, seal(manifest).encode()) and (trust is None or Path(trust).resolve() not in
                                                                 (path, path.parent, path.parent.parent)):
        raise SettingsError(f"{path} was not written by this checkout, or was changed since: its seal is not ours. Loading it "
                            "unpickles, which runs whatever code its author put in. Take its weights as safetensors instead "
                            f"(export=, then model=FOLDER pretrained=True), or, if you trust it, add trust={path}.")
    stray = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()} - {*files, "manifest.json"}
    if stray:                                                # DeepSpeed picks files by pattern
        raise SettingsError(f"{path} holds {sorted(stray)[0]}, which was not there when it was saved, and loading might unpickle it. Remove "
                            "that file.")
    for name, (size, _) in files.items():
        there = (path / name).stat().st_size if (path / name).is_file() else None
        if there != size:
            raise SettingsError(f"{path} is damaged: {name} {'is missing' if there is None else f'has {there:,} bytes'} and was "
                                f"{size:,} bytes when saved. " + _instead(path))
    return manifest


def verify(resume):
    """Compare every file with its hash: what is unpickled is what was saved."""
    for name, (_, known) in resume.manifest["files"].items():
        if digest(resume.path / name) != known:
            raise SettingsError(f"{resume.path} is damaged: the content of {name} is not what was saved. " + _instead(resume.path))


def _instead(path):
    others = [other for other in steps_in(path.parent) if other != path]
    return f"Remove that folder; resume from {others[-1]}." if others else "Remove that folder and start anew with resume=none."


def _contradictions(manifest, settings, given):
    """What of `given` a checkpoint's run had otherwise, in words; "" if nothing."""
    had = {**manifest["settings"], **manifest["resolved"]}
    for key in SAME:
        wanted = absolute(settings[key]) if key in PATHS else settings[key]
        if key in given and wanted not in (had.get(key), None, "auto"):
            return f"{key}={settings[key]} was given, and it has {key}={had.get(key)}"
    return ""


def _take_over(manifest, settings, given, world):
    had, resolved = manifest["settings"], manifest["resolved"]
    for key, value in had.items():
        if key in settings and key not in given and key not in OWN:
            settings[key] = value
    for key in ("precision", "seq", "global_batch", "model"):
        settings[key] = resolved[key]
    if not {"micro_batch", "accumulation"} & set(given):     # other sums round otherwise: kept where the ranks are the same
        settings["micro_batch"] = resolved["micro_batch"] if world == manifest["world"] else None
        settings["accumulation"] = None


def fit(resume, plan):
    """Refuse a resume that this number of ranks, this config or these steps cannot continue; sets resume.convert."""
    manifest, strategy = resume.manifest, plan.settings["strategy"]
    resume.convert = manifest["world"] != plan.world and strategy not in ("dp", "infinity")
    optimizer = plan.config["optimizer"]["type"]
    if resume.convert and optimizer.lower() not in ("adam", "adamw"):
        raise SettingsError(f"{resume.path} was written by {manifest['world']} ranks, and a universal checkpoint, by which another number "
                            f"of ranks loads it, takes Adam's states and not {optimizer}'s. Start with RANKS={manifest['world']}.")
    changed = differences(manifest["model"], shape_of(plan.model_config))
    if changed:
        raise SettingsError(f"model={plan.settings['model']} is not the model that {shown(resume.path)} is of: {changed[0]}. Give that "
                            "one, or start anew with resume=none.")
    if manifest["data"] != plan.corpus.sha256:
        raise SettingsError(f"data={plan.settings['data']}: the text is not the one that {shown(resume.path)} was trained on (SHA-256 "
                            f"{plan.corpus.sha256[:12]}, was {manifest['data'][:12]}). Bring that text back, or start anew with resume=none; "
                            "its weights can be taken along by export=.")
    differs = differences(manifest["config"], plan.config)
    if differs:
        raise SettingsError(f"resume={plan.settings['resume']}: the DeepSpeed config differs from the checkpoint's in {differs[0]}. A "
                            "resumed run keeps its config: take that change back, or start anew with resume=none.")
    if resume.step >= plan.settings["steps"] and not plan.settings["export"]:
        raise SettingsError(f"nothing is left to do: {shown(resume.path)} is of step {resume.step}, and steps={plan.settings['steps']}. "
                            "Give more steps=, or export=FOLDER to write the model.")


def differences(a, b, path=""):
    """Keys in which two configs differ, as "section.key: 1 there, 2 here"."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        name, one, two = f"{path}{key}", a.get(key), b.get(key)
        if key in FREE:
            continue
        if isinstance(one, dict) and isinstance(two, dict):
            found += differences(one, two, name + ".")
        elif one != two:
            found.append(f"{name}: {json.dumps(one)} there, {json.dumps(two)} here")
    return found
