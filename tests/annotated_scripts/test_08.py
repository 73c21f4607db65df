"""08: 1-bit Adam is Adam, then tells all it owes in 1/32 of the bytes; LAMB by its formula; batches, thread, resume, refusals."""

import json
import os
import runpy
import subprocess
import sys
import time

import numpy as np
import pytest

from yardstick import results

SCRIPT = "annotated_scripts/08_bing_bert_annotated.py"
TINY = ["layers=1", "hidden=32", "epochs_128=2", "epochs_512=2", "epoch_steps=5"]


def started(*settings, ranks=2):
    return subprocess.Popen([sys.executable, SCRIPT, *settings], cwd=results.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "DS_ACCELERATOR": "cpu", "RANKS": str(ranks)})


def ran(*settings, ranks=2):
    """(exit code, stdout, stderr) of the script on CPU ranks."""
    process = started(*settings, ranks=ranks)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def losses_of(folder, name="onebit"):
    return json.loads((folder / "record.json").read_text())["details"]["loss"][name]


def own(name):
    """A class or function of the script, in a process that may import it."""
    return runpy.run_path(str(results.ROOT / SCRIPT))[name]


# The run that proves the notes

@pytest.mark.slow
@pytest.mark.timeout(900)
def test_1_bit_adam_is_adam_while_it_warms_up_and_comes_close_after(proved):
    """The same losses to the bit, others from the first step after; in the end within an eighth of what Adam has gained."""
    _, (record,) = proved("08")
    s, measured, curves = record["settings"], record["measured"], record["details"]["loss"]
    warmup = round(s["warmup"] * s["epochs_128"] * s["epoch_steps"])
    adam, onebit = curves["adam"], curves["onebit"]
    assert adam[:warmup + 1] == onebit[:warmup + 1] and warmup > 5       # the loss of a step is that before its update
    assert measured["onebit_warmup_gap_nats_max"] == 0
    assert adam[warmup + 1] != onebit[warmup + 1]
    gained = measured["adam_loss_nats_first"] - measured["adam_loss_nats_last"]
    assert gained > 0.5
    assert measured["onebit_last_gap_nats_mean"] < gained / 8


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_three_learn(proved):
    _, (record,) = proved("08")
    for name in ("adam", "lamb", "onebit"):
        assert record["measured"][f"{name}_loss_nats_last"] < record["measured"][f"{name}_loss_nats_first"] - 0.3, name
        assert record["measured"][f"{name}_512_samples_per_second"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bytes_are_those_of_the_formulas_and_nothing_else_is_sent(proved):
    """measured: every collective that torch was asked for between two batches."""
    _, (record,) = proved("08")
    measured, predicted = record["measured"], record["predicted"]
    for name in ("adam", "lamb", "onebit"):
        assert measured[f"{name}_whole_bytes"] == predicted["whole_bytes"] > 0
    assert measured["onebit_signs_bytes"] == predicted["signs_bytes"]
    assert 31 < measured["onebit_whole_bytes"] / measured["onebit_signs_bytes"] < 32
    assert {key for key in measured if key.endswith("signs_bytes")} == {"onebit_signs_bytes"}


# The optimizers, by themselves

SHAPES = [(300, 7), (5000,), (33,)]
STEPS, WARMUP = 20, 4


def told(sends):
    """What average() was asked and has answered on this rank, summed, and what it still owes; the last weight idles."""
    def rank():
        import torch

        from yardstick import op_cache, ranks
        op_cache.do_without("deepspeed_shm_comm")
        joined = ranks.join(gpu=False, seconds=60)
        weights = [torch.nn.Parameter(torch.ones(shape)) for shape in [*SHAPES, (50,)]]
        optimizer = own("OneBitAdam")([{"params": weights}], lr=1e-3)
        optimizer.warmup, optimizer.sends = WARMUP, sends
        average, asked, answered = optimizer.average, [], []

        def noted(x):
            asked.append(x.double())
            answered.append(average(x).double())
            return answered[-1].float()
        optimizer.average = noted
        local = []
        for step in range(STEPS):
            common = torch.Generator().manual_seed(step)
            alone = torch.Generator().manual_seed(1000 * (joined.rank + 1) + step)
            local.append(optimizer.local)
            for weight in weights[:-1]:
                weight.grad = torch.randn(weight.shape, generator=common)
                if optimizer.local:
                    weight.grad += torch.randn(weight.shape, generator=alone)
            weights[-1].grad = torch.zeros(50)
            optimizer.step()
        worker, server = optimizer.errors
        return [part.numpy() for part in (sum(asked), sum(answered), worker.flatten(), server.flatten(),
                                          torch.cat([weight.detach().flatten() for weight in weights]))] + [local, optimizer.sends]
    return rank


@pytest.mark.parametrize("sends", ["update", "momentum"])
@pytest.mark.parametrize("count", [2, 3])
def test_what_is_told_and_what_is_owed_add_up(launch, sends, count):
    """Over all steps: mean of what was asked = what was answered + mean of the ranks' errors + the shares' errors."""
    every = launch(told, sends, ranks=count).good()
    asked, answered, worker, _, weights = (np.mean([one[part] for one in every], axis=0, dtype=np.float64) if part != 3 else None
                                           for part in range(5))
    size = len(asked)
    server = np.concatenate([one[3] for one in every])[:size].astype(np.float64)
    assert np.abs(answered + worker[:size] + server - asked).max() < 1e-5 * np.abs(asked).max()
    for rank, one in enumerate(every):
        assert one[5] == [False] * WARMUP + [True] * (STEPS - WARMUP), rank
        assert (one[1] == every[0][1]).all() and (one[4] == every[0][4]).all()       # all ranks hear and move alike
    assert not (every[0][0] == every[1][0]).all()                                    # though they ask for different things
    assert np.abs(server).max() > 0 and np.abs(worker).max() > 0
    assert (answered[-50:] == 0).all() and (worker[size - 50:] == 0).all()           # no gradient, so nothing is told
    assert np.allclose(weights[-50:], (1 - 1e-3 * 0.01) ** STEPS, rtol=1e-6)         # decay alone


def lamb_and_its_formula():
    def rank():
        import torch
        lamb, lr, decay, eps = own("Lamb"), 0.02, 0.01, 1e-6
        draw = torch.Generator().manual_seed(0)
        start = [torch.randn(40, 30, generator=draw).double() * scale for scale in (0.05, 3.0)] + [torch.zeros(30).double()]
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = lamb([{"params": weights, "weight_decay": decay}], lr=lr, eps=eps)
        m, v = ([torch.zeros_like(one) for one in start] for _ in "mv")
        w, ratios = list(start), []
        for t in range(1, 4):
            for i, weight in enumerate(weights):
                gradient = torch.randn(weight.shape, generator=draw).double()
                weight.grad = gradient
                m[i] = 0.9 * m[i] + 0.1 * gradient
                v[i] = 0.999 * v[i] + 0.001 * gradient**2
                u = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() + eps) + decay * w[i]
                ratio = w[i].norm() / u.norm() if w[i].norm() > 0 else torch.ones(()).double()
                ratios.append(ratio.item())
                w[i] = w[i] - lr * ratio.clamp(0.01, 0.3) * u
            optimizer.step()
        return [(weight.detach() - expected).abs().max().item() for weight, expected in zip(weights, w)], ratios
    return rank


def test_lamb_is_its_formula(launch):
    """Layers inside the limits, above them, and of zeros."""
    (apart, ratios), = launch(lamb_and_its_formula, ranks=1).good()
    assert max(apart) < 1e-12
    assert 0.01 < ratios[0] < 0.3 < ratios[1] and ratios[2] == 1


# Batches and the thread that makes them

def made():
    def rank():
        from types import SimpleNamespace

        from yardstick import data
        from yardstick.settings import defaults
        space = runpy.run_path(str(results.ROOT / SCRIPT))
        settings = {**defaults(space["CONFIG"]), "epochs_128": 1, "epochs_512": 1, "epoch_steps": 4}
        first, second = space["phases"](settings)
        found = {}
        for phase in (first, second):
            batches = list(space["batches"](settings, phase, range(phase.first, phase.end), 0, 2))
            late = list(space["batches"](settings, phase, range(phase.first + 2, phase.end), 0, 2))
            found[phase.T] = ([[part.numpy() for part in batch] for batch in batches],
                              all((a == b).all() for new, old in zip(late, batches[4:]) for a, b in zip(new, old)), len(late))
        sources = [data.Batches(text, 128, 16, 1) for text in np.split(data.load().train, [len(data.load().train) // 2])]
        rows = [sources[step % 2].step(step // 2, 0, 2, 2) for step in range(4)]
        names = {key: space[key] for key in ("CLS", "SEP", "MASK", "PAD")}
        return found, rows, names, [vars(SimpleNamespace(**vars(phase))) for phase in (first, second)]
    return rank


def test_batches_are_pairs_with_hidden_words_from_two_sets_in_turn(launch):
    (found, rows, names, phases), = launch(made, ranks=1).good()
    cls, sep, mask, pad = (names[key] for key in ("CLS", "SEP", "MASK", "PAD"))
    assert [(phase["first"], phase["end"], phase["batch"]) for phase in phases] == [(0, 4, 16), (4, 8, 8)]
    counts = {"apart": [], "short": 0, "masked": 0, "kept": 0, "hidden": 0}
    for length, most in ((128, 20), (512, 80)):
        batches, same, left = found[length]
        assert len(batches) == 8 and same and left == 4            # begun later, the same: nothing but numbers is remembered
        for number, (tokens, segments, ends, places, labels, apart) in enumerate(batches):
            assert tokens.shape[1] == length and places.shape[1] == most
            for b, end in enumerate(ends):
                cut = int(np.flatnonzero(tokens[b] == sep)[0])
                assert tokens[b, 0] == cls and tokens[b, end - 1] == sep and (tokens[b, end:] == pad).all()
                assert segments[b].tolist() == [0] * (cut + 1) + [1] * (end - cut - 1) + [0] * (length - end)
                at = places[b][labels[b] >= 0]
                assert len(at) == len(set(at)) == min(most, round(0.15 * end)) and not {0, cut, end - 1} & set(at) and at.max() < end
                counts["hidden"] += len(at)
                counts["masked"] += int((tokens[b, at] == mask).sum())
                counts["kept"] += int((tokens[b, at] == labels[b][labels[b] >= 0]).sum())
                counts["short"] += int(end < length)
                if length == 128:                                  # the words are those of the set whose turn it is
                    whole = tokens[b].copy()
                    whole[at] = labels[b][labels[b] >= 0]
                    source = rows[number // 2][number % 2]
                    assert (whole[1:cut] == source[b, 1:cut]).all()
                    follows = (whole[cut + 1:end - 1] == source[b, cut + 1:end - 1]).all()
                    assert follows != bool(apart[b])
            counts["apart"] += apart.tolist()
    assert 0.2 < np.mean(counts["apart"]) < 0.8 and counts["short"] > 0
    assert 0.7 < counts["masked"] / counts["hidden"] < 0.9
    assert 0.05 < counts["kept"] / counts["hidden"] < 0.2


def prefetching():
    def rank():
        import threading
        import traceback
        from contextlib import closing
        prefetched, made = own("prefetched"), []

        def numbers(end, fail=None):
            for number in range(end):
                if number == fail:
                    raise ValueError("a damaged file")
                made.append((number, threading.current_thread() is threading.main_thread()))
                yield number
        facts = {"all": list(prefetched(numbers(7), 3)), "on_main": [main for _, main in made]}
        made.clear()
        with closing(prefetched(numbers(100), 3)) as stream:
            facts["first"] = [next(stream), next(stream)]
        facts["ahead"] = len(made)
        facts["left_over"] = threading.active_count()
        got = []
        try:
            for number in prefetched(numbers(7, fail=5), 3):
                got.append(number)
        except ValueError as error:
            facts["error"] = got, str(error), "numbers" in traceback.format_exc()
        facts["left_over"] += threading.active_count()
        return facts
    return rank


def test_the_thread_keeps_order_and_bound_ends_and_hands_over_its_errors(launch):
    facts, = launch(prefetching, ranks=1).good()
    assert facts["all"] == list(range(7)) and not any(facts["on_main"])
    assert facts["first"] == [0, 1] and 2 <= facts["ahead"] <= 5
    assert facts["error"] == ([0, 1, 2, 3, 4], "a damaged file", True)
    assert facts["left_over"] == 2                               # the main thread, twice


# The program

@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_run_goes_on_exactly(tmp_path):
    """Ended by a signal after its first checkpoint; and from a checkpoint amid the signs, where each rank owes something."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    common = [*TINY, "optimizer=onebit"]
    code, _, error = ran(*common, f"output={whole}")
    assert code == 0, error
    expected = losses_of(whole)
    latest = part / "onebit" / "latest"
    process = started(*common, f"output={part}")
    deadline = time.monotonic() + 120
    while not (latest.exists() and latest.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode != 0
    at = int(latest.read_text().removeprefix("step"))
    assert 0 < at < len(expected)
    assert ran(*common, f"output={part}")[0] == 0
    assert losses_of(part) == expected[at:]
    latest.write_text("step000015")                              # the second phase warms up for steps 10 to 13
    assert (part / "onebit/step000015/errors1.pt").is_file()
    assert ran(*common, f"output={part}")[0] == 0
    assert losses_of(part) == expected[15:]
    for file in (part / "onebit").glob("step000015/errors*.pt"):   # and without what they owe, other losses
        import torch
        torch.save([torch.zeros_like(error) for error in torch.load(file)], file)
    latest.write_text("step000015")
    assert ran(*common, f"output={part}")[0] == 0
    assert losses_of(part)[:1] == expected[15:16] and losses_of(part) != expected[15:]
    code, out, _ = ran(*common, f"output={part}")
    assert code == 0 and "all steps are done" in out
    code, _, error = ran(*common, "seed=2", f"output={part}")
    assert code == 1 and "seed=1" in error and "Traceback" not in error


@pytest.mark.parametrize("settings, ranks, says", [
    (["optimiser=lamb"], 2, "Did you mean optimizer"),
    ([], 3, "global_batch=16 is no multiple of 24"),
    (["hidden=48"], 2, "hidden=48"),
    (["warmup=1"], 2, "warmup=1.0"),
    (["prefetch=0"], 2, "prefetch=0"),
    (["epochs_128=0", "epochs_512=0"], 2, "give epochs_128=3"),
    (["data=no/such/file"], 2, "no/such/file"),
    (["learning_rate=0"], 2, "learning_rate above 0"),
])
def test_what_cannot_be_is_refused_before_any_rank_starts(settings, ranks, says):
    code, _, error = ran(*settings, ranks=ranks)
    assert code == 1 and says in error
    assert len(error.strip().splitlines()) == 1, error


@pytest.mark.slow
def test_one_rank_trains_and_a_loss_that_is_no_number_ends_it(tmp_path):
    code, out, error = ran(*TINY, "optimizer=onebit", f"output={tmp_path / 'one'}", ranks=1)
    assert code == 0, error
    assert losses_of(tmp_path / "one")[-1] < losses_of(tmp_path / "one")[0]
    code, _, error = ran(*TINY, "optimizer=adam", "learning_rate=1e30", f"output={tmp_path / 'two'}")
    assert code != 0 and "Give a lower learning_rate=" in error and "Traceback" not in error


@pytest.mark.slow
def test_a_damaged_folder_is_refused_in_one_message(tmp_path):
    tiny = [*TINY, "optimizer=onebit", f"output={tmp_path}"]
    code, _, error = ran(*tiny)
    assert code == 0, error
    tag = tmp_path / "onebit/step000020"
    for file, text in ((tag / "mp_rank_00_model_states.pt", b"PK"), (tag / "errors1.pt", b""), (tmp_path / "onebit/latest", b""),
                       (tmp_path / "onebit/latest", b"garbage"), (tmp_path / "onebit/latest", b"step000099"),
                       (tmp_path / "settings.json", b"{")):
        kept = file.read_bytes()
        file.write_bytes(kept[:-100] if text == b"PK" else text)
        code, _, error = ran(*tiny)
        file.write_bytes(kept)
        assert code == 1 and "output=" in error and len(error.strip().splitlines()) == 1, (file, error)
    assert ran(*tiny)[0] == 0
