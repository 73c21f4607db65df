"""Every figure appears, is the same each time, and says what it lacks."""

import subprocess
import sys

import pytest

from pipedream.pipedream_visual import FIGURES
from pipedream.simulator import simulate
from yardstick import figures_pipeline, schedules
from yardstick.results import ROOT


def test_one_command_draws_all_of_them_the_same_each_time(tmp_path):
    """By the command line, into runs/figures, and once more here: equal in every byte; and each is committed."""
    done = subprocess.run([sys.executable, "pipedream/pipedream_visual.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = [line.removeprefix("drawn: ") for line in done.stdout.splitlines()]
    assert drawn == [f"runs/figures/pipedream/{name}.png" for name in FIGURES]
    for name in ("schedules", "measured", "partition"):
        FIGURES[name]("cpu2").savefig(tmp_path / "again.png", metadata={"Software": None})
        assert (tmp_path / "again.png").read_bytes() == (ROOT / "runs/figures/pipedream" / f"{name}.png").read_bytes(), name
    assert {path.name for path in (ROOT / "pipedream" / "images").iterdir()} == {f"{name}.png" for name in FIGURES}


def boxes(axes):
    """[(x, y, width, height)] of the operations on an axis, without the rows' background."""
    return [(*box.get_xy(), box.get_width(), box.get_height()) for box in axes.patches if box.get_edgecolor()[:3] == (1, 1, 1)]


@pytest.mark.parametrize("name", ["1f1b", "zb_v", "dualpipe"])
def test_a_timeline_draws_each_operation_where_it_is(name):
    found = simulate(schedules.build(name, 4, 8), send=0.25)
    axes = figures_pipeline.new(9, 4).subplots()
    figures_pipeline.timeline(axes, found.rows)
    wanted = sorted((row[3], rank - 0.44, row[4] - row[3], 0.88) for rank, row_s in enumerate(found.rows) for row in row_s)
    assert sorted(boxes(axes)) == [pytest.approx(one) for one in wanted]
    assert axes.get_xlim() == (0, found.makespan)


def test_a_pair_is_drawn_in_two_halves():
    found = simulate(schedules.build("dualpipe_v", 2, 4), pair=1.0)
    axes = figures_pipeline.new(9, 4).subplots()
    figures_pipeline.timeline(axes, found.rows)
    halves = [one for one in boxes(axes) if one[3] == 0.44]
    assert len(halves) == 2 * sum(map(len, found.schedule.pairs))


@pytest.mark.parametrize("arguments, says", [
    (["figures=schedule"], "figures are schedules, phases"), (["label=none_such", "figures=measured"], "no record results/none_such/"),
    (["figure=phases"], "Did you mean figures?")])
def test_what_is_missing_is_one_message(arguments, says):
    done = subprocess.run([sys.executable, "pipedream/pipedream_visual.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
