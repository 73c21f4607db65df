"""Each annotated script runs, at toy size and under a call tracer, and what its notes cite is entered."""

import re

import pytest

from tests.annotated_scripts.test_form import SCRIPTS
from yardstick import deepspeed_proof

QUICK = "01"                                   # the others' runs take minutes


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [
    pytest.param(path.name[:2], marks=() if path.name[:2] == QUICK else pytest.mark.slow) for path in SCRIPTS])
def test_the_notes_are_proved(proved, number):
    notes, _ = proved(number)
    wrong = [f"line {one.line}: ds:{one.name}" for one, state in notes if not state]
    assert not wrong, "cited beside a line that does not enter it: " + ", ".join(wrong)
    traced = sum(state == "traced" for _, state in notes)
    assert traced >= 0.8 * len(notes) > 0


def test_a_citation_that_is_not_entered_is_found(tmp_path):
    """The same judge, on a script whose second note is wrong, with what a run has entered."""
    one, two, three = deepspeed_proof.cited("a()  #| ds:engine.step\nb()  #| ds:engine.step\nc()  #| ds:zenflow.selective_adam\n")
    seen = {"runtime/engine.py:DeepSpeedEngine.step": {1}, "ops/adam/zenflow_torch_adam.py:ZenFlowSelectiveAdamW.step": {3}}
    assert [deepspeed_proof.verdict(each, seen) for each in (one, two, three)] == ["traced", "", "traced"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_docstring_names_the_first_command(script):
    first = re.search(r"^    python (\S+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert first and first[1] == f"annotated_scripts/{script.name}"
