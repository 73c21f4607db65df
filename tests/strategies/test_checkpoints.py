"""A run that was stopped and resumed is the run that was not; what is damaged or foreign is not loaded."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest

from strategies import checkpoints, resuming
from tests.strategies import cases
from yardstick import deepspeed_memory
from yardstick.settings import SettingsError

slow = pytest.mark.slow
# six sequences a step: one, two and three ranks share them
BASE = {"steps": 6, "global_batch": 6, "seq": 16, "learning_rate": 3e-3, "warmup_steps": 2, "count": False, "save_every": 3,
        "keep": 9, "reduce_bucket_size": 50_000}


def training(changes, stop_after=None):
    """Ranks of the program; each returns its losses. stop_after: a step after which rank 1 is asked to stop."""
    from yardstick import ranks
    plan = cases.plan(**changes)

    def rank():
        from real_model_example import train

        def after_backward(engine, step):
            if step == stop_after and os.environ["RANK"] == "1":
                ranks._stop.append((signal.SIGTERM, 0.0))
        result = train(plan, after_backward, finish=False)
        return result["loss"], result["code"]
    return rank


def claimed(changes):
    """Ranks of a run into whose folder another writes: this process, which started them."""
    import fcntl
    from pathlib import Path
    folder = Path(changes["output"]) / "checkpoints"
    folder.mkdir(parents=True)
    lock = open(folder / "lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    run = training(changes)
    return lambda: (lock, run())[1]


def settings(strategy, models, folder, **changes):
    """infinity's model has shares that are swapped, and a bucket that holds its largest tensor."""
    own = {"model": models["wide"], "reduce_bucket_size": None} if strategy == "infinity" else {"model": models["odd"]}
    return {**BASE, "strategy": strategy, "output": str(folder), **own, **changes}


@pytest.fixture(scope="module")
def saved(server, models, tmp_path_factory):
    """saved(strategy, ...) -> (run folder with its checkpoints, losses of the whole run); kept, to be copied."""
    known = {}

    def of(strategy, ranks=2, **changes):
        key = json.dumps([strategy, ranks, changes], sort_keys=True)
        if key not in known:
            folder = tmp_path_factory.mktemp(strategy)
            out = cases.launch(server, folder, training, settings(strategy, models, folder / "run", **changes), ranks=ranks).good()
            assert [path.name for path in checkpoints.steps_in(folder / "run" / "checkpoints")] == ["step_00000003", "step_00000006"]
            known[key] = folder / "run", out[0][0]
        return known[key]
    return of


def half(folder, copy):
    """A copy of a run as it was after half of its steps."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000006")
    return copy


CASES = [pytest.param("zero2", "fp32"), pytest.param("infinity", "bf16"),
         *(pytest.param(strategy, precision, marks=slow) for strategy, precision in (
             ("dp", "fp32"), ("zero1", "fp32"), ("zero3", "fp32"), ("offload", "fp32"), ("dp", "bf16"), ("zero2", "bf16"),
             ("zero3", "bf16")))]


@pytest.mark.parametrize("strategy,precision", CASES)
def test_a_resumed_run_is_the_run_itself(request, launch, models, saved, tmp_path, strategy, precision):
    if strategy == "infinity":
        request.getfixturevalue("async_io")
    folder, losses = saved(strategy, precision=precision)
    copy = half(folder, tmp_path / "run")
    out = launch(training, {"strategy": strategy, "resume": "auto", "output": str(copy), "eval_batches": 0, "sample_tokens": 0}).good()
    assert out[0][0] == losses                           # every bit of steps 4 to 6; the first three come with the checkpoint
    first, second = (tensors(f / "checkpoints" / "step_00000006") for f in (folder, copy))
    assert first.keys() == second.keys() and len(first) > 3
    assert all(equal(first[name], second[name]) for name in first)


def tensors(step):
    """All that a checkpoint holds, flat: {file and key: tensor, number or text}."""
    import torch
    from safetensors.torch import load_file
    found = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, one in value.items():
                walk(f"{name}.{key}", one)
        elif isinstance(value, (list, tuple)):
            for key, one in enumerate(value):
                walk(f"{name}.{key}", one)
        elif isinstance(value, (torch.Tensor, int, float, str)):
            found[name] = value
    for file in sorted(step.rglob("*")):
        name = file.relative_to(step).as_posix()
        if file.suffix == ".pt":
            held = torch.load(file, weights_only=False, map_location="cpu")
            held.pop("ds_config", None)                  # holds the run's own paths
            walk(name, held)
        elif file.suffix == ".safetensors":
            walk(name, load_file(file))
    return found


def equal(a, b):
    import torch
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@slow
def test_random_numbers_go_on(launch, saved, tmp_path):
    """A model with dropout draws the same masks, others on each rank."""
    from transformers import GPT2Config
    model = tmp_path / "dropout"
    GPT2Config(**cases.ODD, bos_token_id=0, eos_token_id=0, use_cache=False).save_pretrained(model)
    folder, losses = saved("zero1", model=str(model))
    plain, _ = saved("zero1", precision="fp32")
    copy = half(folder, tmp_path / "run")
    assert launch(training, {"strategy": "zero1", "resume": "auto", "output": str(copy)}).good()[0][0] == losses
    masks = [(folder / "checkpoints" / "step_00000006" / "random" / f"rank{r:05d}.safetensors").read_bytes() for r in range(2)]
    assert masks[0] != masks[1] and plain != folder


@pytest.mark.parametrize("strategy,before,after", [
    ("zero2", 2, 3), *(pytest.param(*case, marks=slow) for case in (
        ("dp", 2, 1), ("dp", 2, 3), ("zero1", 2, 1), ("zero1", 2, 3), ("zero2", 2, 1), ("zero3", 2, 1), ("zero3", 2, 3), ("zero3", 1, 2),
        ("offload", 2, 1), ("offload", 2, 3)))])
def test_another_number_of_ranks(launch, models, saved, tmp_path, strategy, before, after):
    folder, losses = saved(strategy, precision="fp32", ranks=before)
    copy = half(folder, tmp_path / "run")
    out = launch(training, {"strategy": strategy, "resume": "auto", "output": str(copy)}, ranks=after).good()
    assert len(out[0][0]) == 6 and max(abs(a - b) for a, b in zip(out[0][0], losses)) < 3e-6
    assert not list((copy / "checkpoints").glob(".*"))   # the converted checkpoint is gone again
    manifest = json.loads((copy / "checkpoints" / "step_00000006" / "manifest.json").read_text())
    assert manifest["world"] == after and manifest["resolved"]["global_batch"] == 6


def test_infinity_keeps_its_ranks(async_io, saved, tmp_path, monkeypatch):
    folder, _ = saved("infinity", precision="bf16")
    message = refusal(monkeypatch, "3", strategy="infinity", resume="auto", output=str(folder), steps=9)
    assert "written by 2 ranks and this run has 3" in message and "RANKS=2" in message


def refusal(monkeypatch, ranks="2", **changes):
    monkeypatch.setenv("RANKS", ranks)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(SettingsError) as caught:
        cases.plan(**changes)
    return str(caught.value)


def test_a_resumed_run_keeps_what_its_losses_depend_on(saved, tmp_path, monkeypatch):
    folder, _ = saved("zero2", precision="fp32")
    run = {"strategy": "zero2", "resume": str(folder), "output": str(tmp_path / "new")}
    assert "seed=9 was given, and it has seed=1" in refusal(monkeypatch, **run, steps=9, seed=9)
    assert "global_batch=8 was given, and it has global_batch=6" in refusal(monkeypatch, **run, steps=9, global_batch=8)
    assert "strategy=zero1 was given" in refusal(monkeypatch, **{**run, "strategy": "zero1"}, steps=9)
    assert "zero_optimization.reduce_bucket_size: 50000 there, 7 here" in refusal(monkeypatch, **run, steps=9, reduce_bucket_size=7)
    assert "nothing is left to do" in refusal(monkeypatch, **run) and not (tmp_path / "new").exists()
    older = {**run, "resume": str(folder / "checkpoints" / "step_00000003"), "output": str(folder)}
    assert "holds step_00000006, later than the step_00000003" in refusal(monkeypatch, **older, steps=9)
    monkeypatch.setenv("RANKS", "2")
    made = cases.plan(**run, steps=9)
    assert made.resume.step == 6 and (made.seq, made.global_batch, made.settings["learning_rate"]) == (16, 6, 3e-3)
    assert made.settings["output"] == str(tmp_path / "new")


def test_a_run_beside_anothers_checkpoints_is_refused(saved, monkeypatch):
    folder, _ = saved("zero2", precision="fp32")
    assert "already holds checkpoints of another run" in refusal(monkeypatch, strategy="zero2", output=str(folder), model="tiny")


def test_another_model_under_the_same_name_is_noticed(launch, models, tmp_path, monkeypatch):
    model = shutil.copytree(models["odd"], tmp_path / "model")
    run = settings("dp", models, tmp_path / "run", model=str(model), steps=1, save_every=1)
    launch(training, run).good()
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**fields, "resid_pdrop": 0.1}))
    message = refusal(monkeypatch, strategy="dp", resume="auto", output=run["output"], steps=4)
    assert "is not the model that" in message and "resid_pdrop: 0.0 there, 0.1 here" in message


def test_a_finished_run_ends_well(saved, monkeypatch, capsys):
    """A job script that always says resume=auto is started once more."""
    folder, _ = saved("zero2", precision="fp32")
    monkeypatch.setenv("RANKS", "2")
    with pytest.raises(SystemExit) as ended:
        cases.plan(strategy="zero2", resume="auto", output=str(folder))
    assert ended.value.code == 0 and "nothing is left to do" in capsys.readouterr().err


def test_ranks_that_cannot_share_the_batch(saved, monkeypatch):
    folder, _ = saved("zero2", precision="fp32")
    message = refusal(monkeypatch, "4", strategy="zero2", resume="auto", output=str(folder), steps=9)
    assert "global_batch=6, which 4 ranks cannot share" in message and "RANKS= one of 1, 2, 3, 6" in message


def test_auto_begins_anew_where_nothing_fits(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANKS", "2")
    made = cases.plan(strategy="zero2", resume="auto", output=str(tmp_path / "empty"), model="tiny")
    assert made.resume is None and "this run begins at step 1" in capsys.readouterr().err
    folder, _ = saved("zero2", precision="fp32")
    assert "belongs to another run: seed=9" in refusal(monkeypatch, strategy="zero2", resume="auto", output=str(folder), seed=9)


def test_auto_finds_the_newest_run_of_a_strategy(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resuming, "ROOT", tmp_path)
    monkeypatch.setenv("RANKS", "2")
    folder, _ = saved("zero2", precision="fp32")
    home = tmp_path / "runs" / "strategies" / "3_zero_stage2"
    for name in ("20260101-000000-1", "20260102-000000-2"):
        half(folder, home / name)
        (home / name / "checkpoints" / "step_00000003" / "manifest.json").touch()
    made = cases.plan(strategy="zero2", resume="auto", output=None)
    assert made.resume.path.parts[-3] == "20260102-000000-2" and made.folder == home / "20260102-000000-2"
    made = cases.plan(strategy="zero2", resume="auto", output=None, seed=5)
    assert made.resume is None and "is of another run: seed=5" in capsys.readouterr().err


# What is damaged, foreign, or not there

def damaged(folder, copy, change):
    copy = half(folder, copy)
    change(copy / "checkpoints" / "step_00000003")
    return {"strategy": "zero2", "resume": "auto", "output": str(copy)}


def test_a_damaged_checkpoint_is_refused(saved, tmp_path, monkeypatch):
    folder, _ = saved("zero2", precision="fp32")
    name = "deepspeed/mp_rank_00_model_states.pt"

    def truncate(step):
        with open(step / name, "r+b") as file:
            file.truncate(1000)

    def flip(step):
        content = bytearray((step / name).read_bytes())
        content[len(content) // 2] ^= 1
        (step / name).write_bytes(content)
    for number, (change, words) in enumerate([
            (truncate, "has 1,000 bytes"), (flip, f"the content of {name} is not what was saved"),
            (lambda step: (step / name).unlink(), f"{name} is missing"),
            (lambda step: (step / "manifest.json").write_text("{"), "manifest.json cannot be read")]):
        message = refusal(monkeypatch, **damaged(folder, tmp_path / str(number), change))
        assert "is damaged" in message and words in message and "Remove that folder" in message


def test_a_file_that_was_not_saved_is_not_loaded(saved, tmp_path, monkeypatch):
    folder, _ = saved("zero2", precision="fp32")
    run = damaged(folder, tmp_path / "run", lambda step: (step / "deepspeed" / "mp_rank_01_model_states.pt").write_bytes(b"x"))
    assert "deepspeed/mp_rank_01_model_states.pt, which was not there when it was saved" in refusal(monkeypatch, **run)


def test_another_text_is_noticed(launch, models, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 400)
    run = settings("dp", models, tmp_path / "run", data=str(tmp_path / "text.txt"), steps=2, save_every=2)
    launch(training, run).good()
    (tmp_path / "text.txt").write_text("ten nine eight seven six five four three two one\n" * 400)
    message = refusal(monkeypatch, strategy="dp", resume="auto", output=run["output"], steps=4)
    assert "the text is not the one" in message and "export=" in message


class Trap:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_foreign_checkpoint_is_not_unpickled(saved, tmp_path, monkeypatch):
    folder, _ = saved("zero2", precision="fp32")
    trap, mark = Trap(), tmp_path / "mark"
    trap.path = mark

    def foreign(step):
        """Another's manifest, right in all but its seal, with a pickle that runs a command."""
        file = step / "deepspeed" / "mp_rank_00_model_states.pt"
        file.write_bytes(pickle.dumps(trap))
        manifest = json.loads((step / "manifest.json").read_text())
        manifest["files"]["deepspeed/mp_rank_00_model_states.pt"] = [file.stat().st_size, checkpoints.digest(file)]
        (step / "manifest.json").write_text(json.dumps(manifest))
    run = damaged(folder, tmp_path / "run", foreign)
    step = tmp_path / "run" / "checkpoints" / "step_00000003"
    message = refusal(monkeypatch, **run)
    assert "its seal is not ours" in message and f"trust={step}" in message and "safetensors" in message
    assert "its seal is not ours" in refusal(monkeypatch, **run, trust=str(folder))
    assert "no folder" in refusal(monkeypatch, **run, trust=str(tmp_path / "none"))
    monkeypatch.setenv("RANKS", "2")
    assert cases.plan(**run, trust=str(step)).resume.step == 3           # asked for by name
    assert not mark.exists()                                             # looking at it ran nothing
    pickle.loads((step / "deepspeed" / "mp_rank_00_model_states.pt").read_bytes())
    assert mark.exists()                                                 # and it would have


def test_another_checkouts_seal_is_foreign(saved, tmp_path, monkeypatch):
    folder, _ = saved("zero2", precision="fp32")
    monkeypatch.setattr(checkpoints, "KEY", tmp_path / "cache" / "key")
    assert "its seal is not ours" in refusal(monkeypatch, strategy="zero2", resume="auto", output=str(folder), steps=9)
    assert (tmp_path / "cache" / "key").stat().st_mode & 0o077 == 0
    (tmp_path / "cache" / "key").write_text("")          # anyone could seal with that
    assert "64 hexadecimal digits" in refusal(monkeypatch, strategy="zero2", resume="auto", output=str(folder), steps=9)


def test_folders_that_are_no_checkpoint(tmp_path, monkeypatch):
    assert "does not exist" in refusal(monkeypatch, resume=str(tmp_path / "none"))
    (tmp_path / "latest").write_text("global_step3")                     # of a program that uses DeepSpeed alone
    assert "no manifest.json" in refusal(monkeypatch, resume=str(tmp_path))


# Space, size, names

def test_the_size_of_a_checkpoint_is_known_before(saved, models):
    from transformers import AutoConfig

    from strategies.models import tensors_of
    folder, _ = saved("zero2", precision="fp32")
    manifest = json.loads((folder / "checkpoints" / "step_00000006" / "manifest.json").read_text())
    predicted = deepspeed_memory.checkpoint_bytes(tensors_of(AutoConfig.from_pretrained(models["odd"])), manifest["config"])
    assert predicted == pytest.approx(manifest["bytes"], rel=0.08)        # of which headers are 5 % of so small a model
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000006\n"


def test_too_little_disk_is_refused_before(monkeypatch, tmp_path):
    from collections import namedtuple
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10**9, 0, 3 * 10**8))
    message = refusal(monkeypatch, model="tiny", save_every=5, output=str(tmp_path / "run"))
    assert "a checkpoint takes 237.4 MB, 3 are to be on the disk at once" in message
    assert "has 300.0 MB free" in message and "save_every=0" in message
    assert "2 are to be" in refusal(monkeypatch, model="tiny", save_every=10, output=str(tmp_path / "run"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10**9, 0, 6 * 10**7))
    assert "the exported model takes 59.4 MB" in refusal(monkeypatch, model="tiny", export=str(tmp_path / "model"))


def test_old_checkpoints_go(launch, models, tmp_path):
    run = settings("dp", models, tmp_path / "run", save_every=1, keep=2)
    launch(training, run).good()
    assert [path.name for path in checkpoints.steps_in(tmp_path / "run" / "checkpoints")] == ["step_00000005", "step_00000006"]


# Stops

def test_a_stop_is_agreed_and_saved(launch, models, saved, tmp_path):
    """One rank is asked; all stop after that step, with a checkpoint, though none was due."""
    _, losses = saved("zero2", precision="fp32")
    run = settings("zero2", models, tmp_path / "run", precision="fp32", save_every=0)
    out = launch(training, run, 1)
    assert [loss for loss, _ in out.good()] == [losses[:2]] * 2
    assert "stopped after step 2 of 6" in out.log and "resume=auto output=" in out.log
    resumed = launch(training, {"strategy": "zero2", "resume": "auto", "output": run["output"]}).good()
    assert resumed[0][0] == losses


@pytest.mark.parametrize("sign,code", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=slow)])
def test_ctrl_c(models, tmp_path, sign, code):
    """As on a terminal: the signal goes to the program; a second one is not needed."""
    words = [sys.executable, "real_model_example.py", "strategy=zero1", f"model={models['small']}", "seq=16", "steps=100000",
             "eval_batches=0", "sample_tokens=0", f"output={tmp_path / 'run'}"]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(words, cwd=cases.ROOT, env=cases.environment(RANKS="2"), stdout=log, stderr=log,
                                   start_new_session=True)
        try:
            until = time.monotonic() + 120
            while "step 1/" not in (tmp_path / "log").read_text():
                assert time.monotonic() < until and process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
            os.killpg(process.pid, sign)                 # a terminal, and Slurm, tell all of its processes
            begin = time.monotonic()
            assert process.wait(60) == code, (tmp_path / "log").read_text()
        finally:
            process.kill()
    text = (tmp_path / "log").read_text()
    assert time.monotonic() - begin < 30 and "Traceback" not in text and "stopped after step" in text
    done = checkpoints.steps_in(tmp_path / "run" / "checkpoints")
    assert len(done) == 1 and f"continue with: RANKS=2 bash strategies/2_zero_stage1/run.sh resume=auto output={tmp_path}" in text
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == done[0].name


# Export

@pytest.mark.parametrize("strategy,precision", [
    ("zero2", "fp32"), *(pytest.param(*case, marks=slow) for case in (
        ("dp", "fp32"), ("zero1", "bf16"), ("zero3", "bf16"), ("offload", "fp32"), ("infinity", "bf16")))])
def test_export(request, launch, models, saved, tmp_path, strategy, precision):
    """A finished run, resumed for nothing but its export: the weights of its checkpoint, tied ones once."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if strategy == "infinity":
        request.getfixturevalue("async_io")
    folder, losses = saved(strategy, precision=precision)
    copy, target = shutil.copytree(folder, tmp_path / "run"), tmp_path / "exported"
    out = launch(training, {"strategy": strategy, "resume": "auto", "output": str(copy), "export": str(target)})
    assert out.good()[0][0] == losses and "read back and compared" in out.log
    written = load_file(target / "model.safetensors")
    assert "lm_head.weight" not in written               # tied to the embedding
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    kept = parameters(strategy, copy / "checkpoints" / "step_00000006", model)
    assert kept.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, kept[name].to(parameter.dtype).view_as(parameter)), name
    assert AutoTokenizer.from_pretrained(target).decode(AutoTokenizer.from_pretrained(target)("def f(x):").input_ids) == "def f(x):"


def parameters(strategy, step, model):
    """The weights of a checkpoint by other means than the program's: torch.load, DeepSpeed's zero_to_fp32, or own shares."""
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import load_file
    names = [name for name, _ in model.named_parameters()]
    if strategy == "dp":
        held = torch.load(step / "deepspeed" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        return {name: held[name] for name in names}
    if strategy != "infinity":
        held = get_fp32_state_dict_from_zero_checkpoint(str(step), tag="deepspeed")
        return {name: held[name] for name in names}
    shares = []
    for rank in sorted((step / "nvme").iterdir()):
        shares.append(torch.cat([load_file(file)["weights"] for file in sorted(rank.glob("group*.safetensors"))]))
    found, at = {}, 0
    for name, parameter in model.named_parameters():     # each tensor is cut alone, in the order of the parameters
        share = -(-parameter.numel() // len(shares))
        found[name] = torch.cat([one[at:at + share] for one in shares])[:parameter.numel()]
        at += share
    return found


def test_export_wants_a_new_folder(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    assert "is not empty" in refusal(monkeypatch, model="tiny", export=str(tmp_path / "there"))
    run = str(tmp_path / "run")
    assert "is the run's own folder" in refusal(monkeypatch, model="tiny", export=run, output=run)
    if os.path.isdir("/proc/self"):                      # where not even root may write
        assert "cannot be written" in refusal(monkeypatch, model="tiny", export="/proc/self/model")


def test_two_runs_do_not_write_into_one_folder(launch, models, tmp_path):
    out = launch(claimed, settings("dp", models, tmp_path / "run", save_every=1))
    assert out.code == 1 and "another run is writing its checkpoints there; give each run its own output=" in out.log
    assert "Traceback" not in out.log.split("could not be written")[0]


@slow
def test_an_exported_model_trains_on(models, tmp_path):
    """Weights go from strategy to strategy as safetensors."""
    first = cases.command([sys.executable, "real_model_example.py", "strategy=zero3", *cases.toy(models["small"], tmp_path / "a"),
                           f"export={tmp_path / 'model'}"])
    assert first.returncode == 0, first.stderr[-3000:]
    second = cases.command([sys.executable, "real_model_example.py", "strategy=offload", "pretrained=True",
                            *cases.toy(tmp_path / "model", tmp_path / "b")])
    losses = [json.loads((tmp_path / run / "record.json").read_text())["details"]["loss"] for run in "ab"]
    assert second.returncode == 0, second.stderr[-3000:]
    assert losses[1][0] < losses[0][0]                   # the same first batch, seen again
