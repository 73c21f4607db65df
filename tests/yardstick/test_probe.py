"""Seconds of steps and phases: which steps count, and which of them a GPU waits in."""

from types import SimpleNamespace

import pytest

from yardstick.probe import APART, Probe
from yardstick.traffic import Meter


def probed(device, steps, monkeypatch, counting=False):
    """(probe, [step in which each wait for the device was]) after steps whose forward waits longer the later it is."""
    import time
    engine = SimpleNamespace(device=SimpleNamespace(type=device), module=None)
    probe = Probe(engine, Meter(), SimpleNamespace(moved=lambda where: None), steps=steps, accumulation=1, counting=counting)
    waits, clock = [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(probe, "_synchronize", lambda: waits.append(probe.step))
    for step in range(steps):
        for phase in ("data", "forward", "backward", "step"):
            with probe(phase, step):
                clock[0] += 10 + step if phase == "forward" else 1
    probe.end_step()
    return probe, waits


def test_a_cpu_times_every_phase_of_every_step(monkeypatch):
    probe, _ = probed("cpu", 7, monkeypatch)
    assert probe.median("forward") == pytest.approx(14) and probe.median("total") == pytest.approx(17)   # of steps 2 to 6
    assert probe.counted_steps() == 5


def test_a_gpu_waits_in_few_steps_only(monkeypatch):
    """The others keep launching kernels while the device computes; only they count for the time of a step."""
    probe, waits = probed("cuda", 2 * APART, monkeypatch)
    steps = range(probe.first, 2 * APART)
    apart = {step for step in steps if step == 2 or (step - 2) % APART == 2}
    assert set(waits) & set(steps) == apart and len(apart) == 3
    assert [step for step, _ in probe.seconds["forward"]] == sorted(apart)
    rest = sorted(set(steps) - apart)
    assert len(rest) == 15 and probe.median("total") == pytest.approx(13 + rest[7])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_short_run_on_a_gpu_has_a_time(monkeypatch, steps):
    probe, _ = probed("cuda", steps, monkeypatch)
    assert probe.median("total") > 0 and probe.median("forward") > 0
