"""The generated blocks of the strategies' cards: each can be printed, and the exercises' numbers are the formulas'."""

import re
import subprocess
import sys

import pytest

import real_model_example
from strategies import cards, effective
from tests.test_documents import Repository
from yardstick import formulas, results, shapes
from yardstick.deepspeed_memory import memory, of_shape
from yardstick.deepspeed_traffic import traffic
from yardstick.settings import defaults, override

TABLES = cards.CONFIG["table"].words
CARDS = {strategy: results.ROOT / "strategies" / folder / "README.md" for strategy, folder in effective.FOLDERS.items()}


def cells(block, name):
    """{heading: number} of one line of a table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n") if line.startswith("|")]
    line = next(row for row in rows if row[0] == name)
    return {heading: float(number.replace(",", "")) for heading, number in zip(rows[0][1:], line[1:])}


@pytest.mark.parametrize("strategy", CARDS)
@pytest.mark.parametrize("table", TABLES)
def test_every_block(table, strategy):
    text = cards.block(table, strategy, "cpu2")
    assert text == text.strip() and not re.search(r"\bNone\b|\bnan\b|_bytes", text)
    if table in ("measured", "exercises", "losses"):
        widths = {line.count("|") for line in text.split("\n") if line.startswith("|")}
        assert len(widths) == 1 and text.count("\n| ") >= 3
    if table == "report":
        assert text.startswith("```text\n== " + strategy) and text.endswith("\n```")
        assert "Sent in one step" in text and "sample" not in text


def test_measured_is_the_record():
    block, got = cards.block("measured", "infinity", "cpu2"), results.read("strategies/6_zero_infinity", "cpu2")["measured"]
    for name, key in (("weights", "parameter_bytes"), ("all in files", "nvme_bytes"), ("in a step: sent by a rank", "ring_bytes")):
        assert cells(block, name)["measured"] == round(got[key] / 1e6, 2)


def test_an_exercise_is_the_formulas():
    config = results.read("strategies/3_zero_stage2", "cpu2")["details"]["config"]
    tensors, got = of_shape(shapes.MODELS["tiny"]), cells(cards.block("exercises", "zero2", "cpu2"), "2: four ranks")
    items, sends = memory(tensors, config, ranks=4), traffic(tensors, config, ranks=4)
    ring = sum(formulas.ring_bytes(row.kind, row.payload_bytes, 4) for row in sends)
    assert got["held by rank 0, MB"] == round(sum(item.nbytes for item in items) / 1e6, 2)
    assert got["straddling, MB"] == round(sum(i.nbytes for i in items if "straddle" in i.name) / 1e6, 2) > 0
    assert got["sent, MB"] == round(ring / 1e6, 2)
    assert got["sent, P"] == round(ring / (4 * tensors.count * 3 / 4), 2)


@pytest.mark.parametrize("strategy", CARDS)
def test_the_numbers_are_those_of_the_shown_commands(strategy):
    """What `bash .../run.sh key=value  # 2` runs is what the line "2: ..." is computed from."""
    pytest.importorskip("hjson")
    text = CARDS[strategy].read_text(encoding="utf-8")
    shown = re.findall(r"^(?:RANKS=(\d+) )?bash strategies/\w+/run\.sh (.+?) +# (\d)$", text, re.MULTILINE)
    lines = {name[0]: changes for name, changes in cards.EXERCISES[strategy].items()}
    assert [number for *_, number in shown] == list(lines)
    config = results.read(f"strategies/{effective.FOLDERS[strategy]}", "cpu2")["details"]["config"]
    tensors = of_shape(shapes.MODELS["tiny"])
    for ranks, arguments, number in shown:
        run = override(real_model_example.CONFIG, [f"strategy={strategy}", "model=tiny", *arguments.split()])
        world, accumulation = int(ranks or 2), run["accumulation"] or 1
        real = effective.effective(run, effective.read(strategy), micro=4, accumulation=accumulation,
                                   precision=effective.precision_of(run, gpu=False))
        case = cards.Case(config, **lines[number])
        assert case.items == memory(tensors, real, ranks=world, accumulation=accumulation)
        assert case.sends == traffic(tensors, real, ranks=world, accumulation=accumulation)


def test_settings_are_checked():
    """By the program, and in documents: test_documents.py reads its CONFIG without importing it."""
    assert defaults(Repository(results.ROOT).config("strategies/cards.py")) == defaults(cards.CONFIG)
    for wrong, says in (("strategy=zero4", "is none of"), ("tabel=report", "Did you mean table?"),
                        ("label=nothing", "no record")):
        done = subprocess.run([sys.executable, "strategies/cards.py", wrong], cwd=results.ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
