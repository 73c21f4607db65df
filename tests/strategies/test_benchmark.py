"""strategies/benchmark.py: three loops that compute alike, ratios with their interval, a record that its table is made of."""

import json
import math
import os
import statistics
import threading

import pytest

from strategies import benchmark
from tests.strategies import cases


def test_intervals_hold_what_they_should():
    """Of ratios drawn around 1.03 the 95 % interval misses it about once in twenty."""
    import random
    draw = random.Random(0)
    missed = 0
    for _ in range(2000):
        mean, lower, upper = benchmark.interval([1.03 * math.exp(draw.gauss(0, 0.02)) for _ in range(4)])
        assert lower < mean < upper
        missed += not lower <= 1.03 <= upper
    assert 60 < missed < 140
    assert math.isnan(benchmark.interval([1.01])[1])


def test_a_summary_and_its_table():
    rounds = [{"bare": 0.1, "uncounted_ratio": 1.01, "counted_ratio": 1.04}, {"bare": 0.2, "uncounted_ratio": 1.02, "counted_ratio": 1.04}]
    summary = benchmark.summarise({"dp": rounds, "zero2": rounds})
    assert summary["measured"]["dp_bare_step_seconds_median"] == pytest.approx(0.15)
    assert summary["measured"]["all_uncounted_ratio"] == pytest.approx(math.sqrt(1.01 * 1.02))
    assert summary["measured"]["zero2_counted_ratio"] == pytest.approx(1.04)
    record = {"measured": summary["measured"], "details": summary, "machine": {"ranks": 2},
              "settings": {"model": "tiny", "global_batch": 4, "seq": 128, "rounds": 2, "steps": 15}}
    text = benchmark.table(record)
    assert "| dp | 150.0 | 1.015 (0.953 to 1.081) | 1.040 (1.040 to 1.040) |" in text and "| aim | | 1.020 | 1.050 |" in text


def test_turns_go_forth_and_back(tmp_path, monkeypatch):
    """Three threads in place of three loops: one at a time, in the order A B C C B A A B C ..."""
    monkeypatch.setenv("BENCHMARK_FOLDER", str(tmp_path))
    order, steps = [], 7
    for loop in benchmark.LOOPS:
        os.mkfifo(tmp_path / f"turn_{loop}_0")
    turns = {loop: benchmark.Turns(loop, 0, steps, gpu=False) for loop in benchmark.LOOPS}

    def train(loop):
        for step in range(steps):
            turns[loop]()
            if step < steps - 1:
                order.append(loop[0])
    threads = [threading.Thread(target=train, args=(loop,)) for loop in benchmark.LOOPS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert "".join(order) == "buccub" * 3 and all(len(one.seconds) == steps - 1 for one in turns.values())


def test_loops_that_do_not_train_alike_are_not_compared():
    alike = {"bare": {"loss": [8.0, 7.0]}, "uncounted": {"loss": [8.0, 7.0001]}, "counted": {"loss": [8.0, 7.0]}}
    benchmark.check_losses("dp", alike)
    with pytest.raises(SystemExit, match="the loss of step 2 is 7.1 and the bare loop's 7.0"):
        benchmark.check_losses("dp", {**alike, "counted": {"loss": [8.0, 7.1]}})


@pytest.mark.parametrize("argument, words", [("steps=5", "steps=5 must be at least 8"), ("rounds=0", "rounds=0 must be at least 1"),
                                             ("strategy=zero9", "strategy=zero9 is none of"), ("table=none-such", "none-such")])
def test_bad_settings_are_refused(argument, words):
    ended = cases.command(["python", "strategies/benchmark.py", argument])
    assert ended.returncode == 1 and words in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "offload"])
def test_toy_sizes(models, tmp_path, strategy):
    """Real runs of all three loops. At this size a step is mostly overhead, and a busy machine is worse than that."""
    ended = cases.command(["python", "strategies/benchmark.py", f"strategy={strategy}", "rounds=2", "steps=9", f"model={models['small']}", "seq=16"])
    assert ended.returncode == 0, ended.stderr
    path = cases.ROOT / ended.stdout.partition("record: ")[2].strip()
    record = json.loads(path.read_text())
    assert record["run"] == "strategies/benchmark" and record["outcome"] == "ok"
    rounds = record["details"]["medians"][strategy]
    assert len(rounds) == 2 and all(0 < one[loop] < 10 for one in rounds for loop in benchmark.LOOPS)
    for loop in benchmark.AIMS:
        ratio = record["measured"][f"{strategy}_{loop}_ratio"]
        assert ratio == pytest.approx(statistics.geometric_mean(one[f"{loop}_ratio"] for one in rounds), rel=1e-6) and 0.5 < ratio < 5
    assert benchmark.table(record) in ended.stdout
