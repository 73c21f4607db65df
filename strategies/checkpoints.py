"""Checkpoints of a run, written and read by its ranks: saved whole or not at all, continued exactly.

    <run folder>/checkpoints/step_00000020/      made under another name, renamed when complete
        manifest.json        settings, DeepSpeed config, losses so far, every file's size and SHA-256, and a seal
        deepspeed/           what engine.save_checkpoint writes; loading it unpickles (torch.load, weights_only=False)
        nvme/                in place of that for strategy=infinity: see nvme_state.py
        random/              each rank's random state
    <run folder>/checkpoints/latest              the name of the newest one, for people and other tools
    <run folder>/checkpoints/lock                held by the run that writes here

The seal is an HMAC of the manifest with a key that lies in this checkout (runs/cache/): pickles run code, so what
another program wrote is not loaded unless the user names it (trust=). Which checkpoint a run continues from, and whether it
may, is decided in resuming.py before any rank starts.
"""

import fcntl
import hashlib
import hmac
import json
import os
import resource
import secrets
import shutil
import time
from pathlib import Path

from strategies import nvme_state, universal
from yardstick import deepspeed_memory
from yardstick.settings import SettingsError
from yardstick.shapes import MODELS

ROOT = Path(__file__).resolve().parent.parent
PATHS = ("model", "data", "config", "tokenizer")         # settings that may be paths
KEY = ROOT / "runs" / "cache" / "checkpoint_key"


def seal(manifest):
    """HMAC-SHA-256 of a manifest without its seal, hexadecimal, by the key of this checkout (made at first use)."""
    if not KEY.exists():
        mine = KEY.with_suffix(f".{os.getpid()}")
        try:
            KEY.parent.mkdir(parents=True, exist_ok=True)
            mine.touch(mode=0o600)
            mine.write_text(secrets.token_hex(32))
            os.link(mine, KEY)                               # whoever comes first
        except FileExistsError:
            pass
        except OSError as error:
            raise SettingsError(f"{KEY.parent} cannot be written ({error.strerror}), and a key for checkpoints must lie there.") from None
        finally:
            mine.unlink(missing_ok=True)
    try:
        key = bytes.fromhex(KEY.read_text().strip())
    except (OSError, ValueError) as error:
        key, why = b"", str(error)
    else:
        why = f"it holds {len(key)} bytes"
    if len(key) != 32:
        raise SettingsError(f"{KEY}, by which this checkout knows its checkpoints, cannot be used ({why}): it must hold 64 hexadecimal "
                            "digits. Remove it; checkpoints made before then need trust=.")
    text = json.dumps({k: v for k, v in manifest.items() if k != "seal"}, sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def steps_in(folder):
    """The complete checkpoints of a run, oldest first. What is under way has another name."""
    return sorted(path for path in Path(folder).glob("step_*") if (path / "manifest.json").is_file())


def absolute(value):
    """A path without the folder in which it was typed; what is no path stays."""
    return str(Path(value).resolve()) if value and value not in MODELS and Path(value).exists() else value


def shape_of(model_config):
    """A model's config without what says where it came from."""
    fields = json.loads(json.dumps(model_config.to_dict(), default=str))
    return {key: value for key, value in fields.items() if key not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")}


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown(path):
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def check_space(folder, nbytes, copies=1, what="a checkpoint", largest=0):
    """Refuse where `copies` more of `nbytes` do not fit, with a tenth in reserve, or a file of `largest` is not allowed."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, limit = shutil.disk_usage(there).free, resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if 0 <= limit < largest:                                 # RLIM_INFINITY is -1
        raise SettingsError(f"a file of {what} takes {size(largest)} and this shell allows files of {size(limit)}. Raise it with "
                            "`ulimit -f unlimited`.")
    if free < 1.1 * copies * nbytes:
        raise SettingsError(f"{what} takes {size(nbytes)}, {f'{copies} are to be on the disk at once, ' if copies > 1 else ''}and {there} "
                            f"has {size(free)} free (10 % is kept in reserve). Free some, give a folder on a larger disk, or leave it out "
                            "(save_every=0, no export=).")


def size(nbytes):
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


class Checkpoints:
    """Saves and loads one run's checkpoints. Every rank makes one and calls each method at the same step."""

    def __init__(self, plan, engine, rank, watchdog):
        self.plan, self.engine, self.rank, self.watchdog = plan, engine, rank, watchdog
        self.folder = self._agreed(plan.folder) / "checkpoints"
        self.nvme = plan.settings["strategy"] == "infinity"
        self.lock, self.owed = None, False
        self.nbytes = deepspeed_memory.checkpoint_bytes(plan.tensors, plan.config)

    def _agreed(self, folder):
        """Rank 0's: launchers of several machines each make a name of their own for a run."""
        import torch
        shared = [str(folder)]
        torch.distributed.broadcast_object_list(shared, 0)
        return Path(shared[0])

    def due(self, step, skipped=False):
        """True where the settings want a checkpoint after `step` (counted from 0).

        skipped: the update was; the checkpoint then waits for the next that is not, so that a run which only skips does not
        replace the good ones.
        """
        every = self.plan.settings["save_every"]
        self.owed |= bool(every) and ((step + 1) % every == 0 or step + 1 == self.plan.settings["steps"])
        return self.owed and not skipped

    def save(self, step, losses):
        """Write the state after `step` (counted from 0) and return its folder. Ends the run where that fails."""
        import torch
        name = f"step_{step + 1:08d}"
        part, final = self.folder / f".saving_{name}", self.folder / name
        self.watchdog.moved(f"the checkpoint after step {step + 1}")
        self.begun = time.monotonic()
        try:
            if self.rank.rank == 0:
                self._claim()
                for stale in self.folder.glob(".*"):         # of a save that was killed
                    shutil.rmtree(stale, ignore_errors=True)
                check_space(self.folder, self.nbytes)
                (part / "random").mkdir(parents=True)
            torch.distributed.barrier()
            self._write(part)
            torch.distributed.barrier()
            files = self._hash(part)
            if self.rank.rank == 0:
                self._complete(part, final, step + 1, losses, files)
        except (OSError, RuntimeError, SettingsError) as error:
            before = steps_in(self.folder)
            raise SystemExit(f"[rank {self.rank.rank}/{self.rank.world}] the checkpoint after step {step + 1} could not be written to "
                             f"{self.folder}: {str(error).strip().splitlines()[0]} ({self._free()}). "
                             + (f"{before[-1].name} before it is whole: resume=auto continues from there." if before else
                                "There is none before it.")) from None
        torch.distributed.barrier()
        self.owed = False
        self.watchdog.moved(f"the end of step {step + 1}")
        return final

    def _claim(self):
        """One run at a time writes into a folder; the lock goes with the process."""
        if self.lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError("another run is writing its checkpoints there; give each run its own output=") from None

    def _free(self):
        there = next(parent for parent in (self.folder, *self.folder.parents) if parent.exists())
        return f"{size(shutil.disk_usage(there).free)} free, {size(self.nbytes)} needed"

    def _write(self, part):
        import torch
        from safetensors.torch import save_file
        if self.nvme:
            nvme_state.save(self.engine, part / "nvme", self.rank.rank)
        else:
            self.engine.save_checkpoint(str(part), tag=universal.TAG, save_latest=False)
        state = {"cpu": torch.get_rng_state()}
        if self.rank.gpu:
            state["cuda"] = torch.cuda.get_rng_state()
        save_file(state, part / "random" / f"rank{self.rank.rank:05d}.safetensors")

    def _hash(self, part):
        """{file: [bytes, SHA-256]} of all ranks' files, flushed to the disk; the ranks share the work. Collective."""
        import torch
        names = sorted(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file())
        absent = [r for r in range(self.rank.world) if f"random/rank{r:05d}.safetensors" not in names]
        if absent:
            raise OSError(f"the files of rank {absent[0]} are not seen by rank {self.rank.rank}: output= must be on a disk that all "
                          "machines share")
        mine = {}
        for name in names[self.rank.rank::self.rank.world]:
            with open(part / name, "rb") as file:
                os.fsync(file.fileno())
            mine[name] = [(part / name).stat().st_size, digest(part / name)]
        everyone = [None] * self.rank.world
        torch.distributed.all_gather_object(everyone, mine)
        return {name: entry for one in everyone for name, entry in one.items()}

    def _complete(self, part, final, step, losses, files):
        import deepspeed
        import torch
        plan = self.plan
        written = sum(nbytes for nbytes, _ in files.values())
        manifest = {"step": step, "world": plan.world, "run": plan.run, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    "settings": {key: absolute(value) if key in PATHS else value for key, value in plan.settings.items()},
                    "data": plan.corpus.sha256, "model": shape_of(plan.model_config),
                    "resolved": {"model": absolute(plan.settings["model"]), "precision": plan.precision, "seq": plan.seq,
                                 "global_batch": plan.global_batch, "micro_batch": plan.micro_batch,
                                 "strategy": plan.settings["strategy"]},
                    "config": plan.config, "loss": losses, "bytes": written, "files": files,
                    "seconds": round(time.monotonic() - self.begun, 3),
                    "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__}}
        manifest["seal"] = seal(manifest)
        with open(part / "manifest.json", "w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():                                   # this step was saved before a resume from an earlier one
            final.rename(self.folder / f".old_{final.name}")
        part.rename(final)                                   # from here on it is a checkpoint
        _flush(self.folder)
        pointer = self.folder / ".latest"
        pointer.write_text(final.name + "\n")
        os.replace(pointer, self.folder / "latest")
        for old in [*steps_in(self.folder)[:-plan.settings["keep"]], *self.folder.glob(".old_*")]:
            if old != final:                                 # first out of sight: half of one would stay for ever
                gone = old if old.name.startswith(".") else old.rename(self.folder / f".old_{old.name}")
                shutil.rmtree(gone, ignore_errors=True)

    def load(self, resume):
        """Continue from a checkpoint: (steps done, their losses)."""
        import torch
        from safetensors.torch import load_file
        self.watchdog.moved(f"loading {resume.path.name}")
        if self.nvme:
            nvme_state.load(self.engine, resume.path / "nvme", self.rank.rank)
        elif resume.convert:
            universal.load(self.engine, resume, self.folder / f".universal_{resume.path.name}", self.rank, self.watchdog)
        else:
            self.engine.load_checkpoint(str(resume.path), tag=universal.TAG)
        random = resume.path / "random" / f"rank{self.rank.rank:05d}.safetensors"
        if random.exists():                                  # else: there are more ranks than were saved
            state = load_file(random)
            torch.set_rng_state(state["cpu"])
            if self.rank.gpu and "cuda" in state:
                torch.cuda.set_rng_state(state["cuda"])
        if self.engine.global_steps != resume.step:
            raise SystemExit(f"{resume.path} is of step {resume.step} and DeepSpeed has loaded step {self.engine.global_steps}.")
        return resume.step, list(resume.manifest["loss"])


def _flush(folder):
    """Make renames in `folder` last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
