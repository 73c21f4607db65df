"""04: what initialize does to the weights, which columns ZenFlow chooses, when which columns move, what happens to its worker."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import psutil
import pytest

from yardstick import results

SCRIPT = "annotated_scripts/04_zenflow_zero2_annotated.py"
TINY = ["hidden=32", "seq=16", "micro_batch=2", "epoch=64"]
MATRICES = 16                                      # of two layers of a Llama, seven each, with embedding and head
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "RANKS": "2", "HF_HUB_OFFLINE": "1"}
slow = pytest.mark.slow


def asked(settings):
    """Rounds, from 1, in which the host is asked for an update of all columns."""
    return [n for n in range(1, settings["rounds"] + 1) if n < settings["warm_up"]
            or (n - settings["warm_up"]) % settings["update_interval"] == 0 or n % settings["epoch"] == 0]


def at_home(settings, kind):
    """Rounds in which the columns that are not chosen should move."""
    if kind in ("plain", "interval_1"):
        return list(range(1, settings["rounds"] + 1))
    if kind == "sequential":
        return asked(settings)
    late = [n for n in asked(settings) if n > settings["warm_up"]]          # one interval later, or before columns are chosen anew
    home = [n + 1 if n % settings["epoch"] == 0 else after for n, after in zip(late, [*late[1:], settings["rounds"] + 1])]
    return [n for n in asked(settings) if n <= settings["warm_up"]] + [n for n in home if n <= settings["rounds"]]


def moved(row):
    """[rounds in which chosen columns moved], [rounds in which the others did]."""
    return [[n for n, pair in enumerate(row["moved"], 1) if pair[which]] for which in (0, 1)]


@pytest.fixture
def compared(proved):
    _, (record, _, _) = proved("04")
    return record


@slow
def test_initialize_transposes_every_matrix_and_the_repair_gives_the_first_loss_back(compared):
    measured = compared["measured"]
    plain = measured["plain_loss_nats_first"]
    assert measured["plain_transposed_count"] == 0 and measured["plain_transposed_loss_nats_first"] == plain
    for kind in ("interval_1", "sequential", "overlapped"):
        assert measured[f"{kind}_transposed_count"] == MATRICES and measured[f"{kind}_mended_changed_count"] == 0
        assert abs(measured[f"{kind}_transposed_loss_nats_first"] - plain) > 1e-3
        assert measured[f"{kind}_loss_nats_first"] == pytest.approx(plain, abs=1e-6)


@slow
def test_with_update_interval_1_it_equals_plain_offload(compared):
    plain, every = (compared["details"][kind]["losses"] for kind in ("plain", "interval_1"))
    assert every == pytest.approx(plain, abs=1e-5) and plain[-1] < plain[0] - 0.1
    for kind in ("sequential", "overlapped"):                                # the comparison can fail
        assert compared["measured"][f"{kind}_apart_from_plain_nats_max"] > 1e-3


@slow
def test_the_interval_overwrites_the_accumulation_and_divides_the_gradient(compared):
    measured, interval = compared["measured"], compared["settings"]["update_interval"]
    for kind in ("sequential", "overlapped"):
        assert measured[f"{kind}_accumulation_steps"] == interval > 1
        assert measured["plain_gradient_norm_first"] / measured[f"{kind}_gradient_norm_first"] == pytest.approx(interval, rel=1e-4)
    assert measured["plain_accumulation_steps"] == measured["interval_1_accumulation_steps"] == 1


@slow
def test_as_delivered_it_chooses_other_columns_than_the_largest(compared):
    """interval_1 chooses as delivered, the other two from a bucket without vectors."""
    measured, ratio = compared["measured"], compared["settings"]["topk_ratio"]
    assert measured["interval_1_largest_chosen_fraction"] < 0.5
    for kind in ("sequential", "overlapped"):
        (n, columns), = compared["details"][kind]["choices"]
        assert n == compared["settings"]["warm_up"] + 1 and len(columns) == int(3 * compared["settings"]["hidden"] * ratio)
        assert measured[f"{kind}_largest_chosen_fraction"] == 1
        assert measured[f"{kind}_chosen_share_fraction_first"] > max(measured["interval_1_chosen_share_fraction_first"], ratio)


@slow
@pytest.mark.parametrize("run, kind", [(0, "plain"), (0, "interval_1"), (0, "sequential"), (0, "overlapped"),
                                       (1, "overlapped"), (2, "sequential")])
def test_which_columns_move_in_which_round(proved, run, kind):
    _, records = proved("04")
    settings, row = records[run]["settings"], records[run]["details"][kind]
    chosen, others = moved(row)
    assert others == at_home(settings, kind)
    first = {"plain": settings["rounds"], "interval_1": 0}.get(kind, settings["warm_up"]) + 1
    assert chosen == list(range(first, settings["rounds"] + 1))
    if kind in ("sequential", "overlapped"):
        assert [n for n, due in enumerate(row["due"], 1) if due] == asked(settings)


@slow
def test_step_stalls_only_where_the_host_is_asked(compared):
    settings, rows = compared["settings"], compared["details"]
    due = asked(settings)
    for kind in ("sequential", "overlapped"):
        stall = rows[kind]["stall"]
        between = [one for n, one in enumerate(stall, 1) if n not in due]
        assert statistics.median(between) < 0.2 * statistics.median([stall[n - 1] for n in due])
        assert statistics.median(between) < 0.2 * statistics.median(rows["plain"]["stall"])


@slow
def test_it_waits_for_each_update_once_and_the_gain_is_not_claimed_without_a_gpu(compared):
    late = [n for n in asked(compared["settings"]) if n > compared["settings"]["warm_up"]]
    assert len(compared["details"]["overlapped"]["waits"]) == compared["settings"]["warm_up"] + len(late)
    assert ("overlapped_gain_ratio" in compared["measured"]) == (compared["machine"]["accelerator"] != "none")


@slow
def test_columns_are_chosen_anew_in_each_epoch_and_the_trained_weights_are_saved(proved):
    _, (_, overlapped, sequential) = proved("04")
    row, settings = overlapped["details"]["overlapped"], overlapped["settings"]
    assert settings["dtype"] == "bf16" and [n for n, _ in row["choices"]] == [1, settings["epoch"] + 1]
    assert row["choices"][0][1] != row["choices"][1][1]
    assert row["kept"] is True and sequential["details"]["sequential"]["kept"] is True
    assert sequential["settings"]["gradient_clipping"] > 0


@slow
def test_one_core_is_shared_and_the_merged_shares_are_not_the_weights(tmp_path):
    """Two ranks that may use one core: DeepSpeed's split is empty, which would stand for all cores."""
    core = max(os.sched_getaffinity(0))
    done = subprocess.run([sys.executable, SCRIPT, *TINY, "mode=overlapped", "rounds=12", f"output={tmp_path}"], cwd=results.ROOT,
                          capture_output=True, text=True, timeout=400, env={**os.environ, **ENVIRONMENT},
                          preexec_fn=lambda: os.sched_setaffinity(0, {core}))
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads((tmp_path / "record.json").read_text())["details"]["overlapped"]
    assert row["cores"] == [[core], [core]] and row["kept"] is True
    code = ("import sys, torch\nfrom deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as merge\n"
            "merged = merge(sys.argv[1], tag='last')\nkept = torch.load(sys.argv[1] + '/last/mp_rank_00_model_states.pt')['module']\n"
            "print(sum(torch.equal(merged[name], kept[name]) for name in kept if kept[name].dim() == 2), len(kept))")
    merged = subprocess.run([sys.executable, "-c", code, str(tmp_path / "checkpoint")], capture_output=True, text=True, timeout=200,
                            env={**os.environ, **ENVIRONMENT})
    assert merged.stdout.splitlines()[-1].split() == ["0", "21"], merged.stderr[-2000:]


@slow
@pytest.mark.parametrize("whom", ["a rank", "a worker", "a worker that starts"])
def test_who_is_killed_ends_the_run_and_leaves_nothing_behind(whom, tmp_path):
    """DeepSpeed alone would wait a minute for a dead worker, ten for one that dies at the start, and leave workers of dead ranks."""
    run = subprocess.Popen([sys.executable, SCRIPT, *TINY, "mode=overlapped", "rounds=100000", f"output={tmp_path}"], cwd=results.ROOT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT})
    try:
        def children(word):
            found = []
            for one in psutil.Process(run.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):              # some live for a moment, as git does
                    found += [one] if word in " ".join(one.cmdline()) else []
            return found

        deadline = time.monotonic() + 200
        while len(children("spawn_main")) < (1 if whom == "a worker that starts" else 2):
            assert run.poll() is None and time.monotonic() < deadline, run.stderr.read()[-3000:]
            time.sleep(0.05)
        if whom != "a worker that starts":
            time.sleep(20)                                                   # they import DeepSpeed, then the run goes on
        every = psutil.Process(run.pid).children(recursive=True)
        victim = children(SCRIPT)[0] if whom == "a rank" else children("spawn_main")[0]
        victim.send_signal(signal.SIGKILL)
        started = time.monotonic()
        code = run.wait(timeout=50)
        assert code and time.monotonic() - started < 45
        if whom != "a rank":
            assert f"its worker process {victim.pid} ended" in run.stderr.read()
        assert not psutil.wait_procs(every, timeout=10)[1]
    finally:
        run.kill()
        run.wait()


@pytest.mark.parametrize("settings, says", [
    ("update_intervall=2", "Did you mean update_interval?"), ("topk_ratio=1.0", "above 0 and below 1"), *(
        pytest.param(*one, marks=slow) for one in (
            ("update_interval=auto", "not a whole number"), ("epoch=2", "epoch=2 must be 4 or more"), ("rounds=6", "Give rounds=12"),
            ("hidden=30", "multiple of 8"), ("weight=lm_head", "lm_head.weight"), ("model=nowhere", "nowhere"),
            ("dtype=fp16", "dtype=fp16"), ("epoch=1000000", "epoch=1000000 takes"), ("warm_up=-1", "warm_up=-1"),
            ("learning_rate=0", "learning_rate above 0"), ("gradient_clipping=-1", "gradient_clipping=-1.0"),
            ("data=nowhere.txt", "nowhere.txt")))])
def test_bad_input_gives_one_message(settings, says):
    done = subprocess.run([sys.executable, SCRIPT, settings], cwd=results.ROOT, capture_output=True, text=True, timeout=200,
                          env={**os.environ, **ENVIRONMENT})
    assert done.returncode and says in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
