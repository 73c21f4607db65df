"""The answers are computed: what they say of gradients, delays and letters holds when it is computed another way."""

import re
import subprocess
import sys

import numpy as np
import pytest

from pipedream import questions
from yardstick.results import ROOT
from yardstick.settings import defaults

SETTINGS = defaults(questions.CONFIG)


def answer(question, **changed):
    return "\n".join(questions.ANSWERS[question]({**SETTINGS, **changed}))


def numbers(text, line):
    return [float(word) for word in re.findall(r"(?<![\w.])-?\d+\.?\d*(?:e[-+]\d+)?", next(one for one in text.splitlines() if line in one))]


@pytest.mark.parametrize("count", (2, 4))
def test_loss(count):
    text = answer("loss", micro_batches=count)
    assert f" {count}.000000 times as long" in text
    assert numbers(text, f"loss / {count}:")[-1] < 1e-14 and 0 < numbers(text, "Adam's")[0] < 0.1


def test_naive_is_the_gradient_of_neither():
    text = answer("naive", stages=3, learning_rate=0.05)
    kept, mixed = numbers(text, "stashing: backward"), numbers(text, "naive: backward")
    assert kept[0] == 0 and kept[1] > 0.01 and min(mixed) > 0.01
    still = answer("naive", stages=3, learning_rate=0.0)             # without a change of weights all are one
    assert numbers(still, "naive: backward") == [0, 0]


@pytest.mark.parametrize("delay", (0, 1, 2, 5))
def test_the_largest_stable_rate_of_a_delay(delay):
    def grows(rate):
        past = [1.0] * (delay + 1)
        for _ in range(3000):
            past = [past[0] - rate * past[-1], *past[:-1]]
        return abs(past[0]) > 1
    bound = questions.largest_rate(delay)
    assert bound == pytest.approx(2 * np.sin(np.pi / (4 * delay + 2)), rel=1e-6)
    assert grows(bound * 1.02) and not grows(bound * 0.98)


def test_staleness_of_a_small_model():
    text = answer("staleness", updates=12)
    assert len([line for line in text.splitlines() if "stash" in line or "vertical_sync" in line or "plain SGD" in line]) == 8
    plain, two = numbers(text, "plain SGD"), numbers(text, "2  stash")
    assert all(abs(a - b) < 0.5 for a, b in zip(plain[1:3], two[1:3]))


def test_zero2_and_b_are_formulas():
    text = answer("zero2")
    assert numbers(text, "   8  ") == [8, 1.75, 1, 7.875, 0.125] or "4.50x" in text
    text = answer("B", stages=6)
    assert numbers(text, "zero-bubble paper, B")[-1] == numbers(text, "DeepSeek, B")[-1] == numbers(text, "simulated idle")[-1] == 7.5
    assert "wrong by (p-1) W" in text


def test_the_program_prints_an_answer_or_one_message():
    done = subprocess.run([sys.executable, "pipedream/questions.py", "question=B"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == answer("B").strip()
    done = subprocess.run([sys.executable, "pipedream/questions.py", "question=why"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "is none of loss" in done.stderr and len(done.stderr.splitlines()) == 1
