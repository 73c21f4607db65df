"""Every annotated script keeps the form of its kind, and each rule of the form finds a bad example."""

import pytest

from tests.annotated_scripts import form
from yardstick.deepspeed_proof import FOLDER

SCRIPTS = sorted(FOLDER.glob("0*_annotated.py"))
GOOD = '''"""A script.

https://github.com/deepspeedai/DeepSpeedExamples/blob/45b4b71/training/a.py

Proof:
    steps=2
"""

# == 1. First (upstream 1-10) =====
import deepspeed                                                     #| a note

# == 2. Second (not upstream) =====
x = 1                                                                #| a note
# == 3. Third (upstream 11-20, other.py 3-9) =====
engine = deepspeed.initialize(                                       #| a note
    model="# no comment")
'''


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", form.RULES, ids=lambda rule: rule.__name__)
def test_form(script, rule):
    found = rule(script.name, script.read_text(encoding="utf-8"))
    assert not found, "\n" + "\n".join(found)


def test_a_good_example_passes():
    assert not form.errors("a.py", GOOD)


@pytest.mark.parametrize("old, new, says", [
    ("x = 1    ", "x = 1   ", "begins in column 69"),
    ("x = 1    ", "x = 1" + " + 1" * 16, "ends in column"),
    ("a note\n# == 3", "a note " + "long " * 20 + "\n# == 3", "columns, more than"),
    ("x = 1   ", "x = 1 # why\ny = 2   ", "a comment that is no note"),
    ("1   #| a", "1   #|a", "no words"),
    ("Proof:", "Proofs:", "no paragraph Proof"), ("blob/45b4b71", "blob/main", "no link"),
    ("# == 2.", "# == 3.", "no heading like '# == 2."), ("(not upstream)", "", "no heading"),
    ("x = 1                                                                #| a note", "x = 1", "a section without a note"),
    ("initialize(                                       #| a note", "initialize(", "is called without a note"),
    ("x = 1    ", "import deepspeed.comm as dist\ndist.barrier()\nx = 1    ", "dist.barrier is called without a note"),
    ("x = 1    ", "from deepspeed import comm\ncomm.barrier()\nx = 1    ", "comm.barrier is called without a note"),
])
def test_each_rule_finds_a_bad_example(old, new, says):
    old = old if old in GOOD else old.replace("1   #|", "1" + " " * 64 + "#|")
    new = new if "1   #|a" not in new else "1" + " " * 64 + "#|a"
    assert old in GOOD
    found = form.errors("a.py", GOOD.replace(old, new))
    assert any(says in error for error in found), found
