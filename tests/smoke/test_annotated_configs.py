"""The commands of the README of the annotated configs, as a user types them."""

import re
import subprocess

import pytest

from tests.strategies import cases
from yardstick.results import ROOT

TEXT = (ROOT / "annotated_configs" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
TRAINS = re.compile(r"^python (annotated_configs/train|real_model_example)\.py .*$", re.MULTILINE)


def name(block):
    return re.sub(r"\W+", "_", block.strip().splitlines()[-1])[-60:]


@pytest.mark.timeout(1800)                     # the first run compiles C++ ops
@pytest.mark.parametrize("block", [pytest.param(block, id=name(block), marks=pytest.mark.slow if TRAINS.search(block) and number else ())
                                   for number, block in enumerate(BLOCKS)])
def test_shown_commands(request, tmp_path, block):
    """In a folder that has the checkout's files and a runs/ of its own; what is trained by writes its record there."""
    if TRAINS.search(block):
        request.getfixturevalue("compiled_adams")
        request.getfixturevalue("async_io")
    for path in ROOT.iterdir():
        if path.name != "runs" and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    script = TRAINS.sub(lambda match: f"{match[0]} output={tmp_path / 'out'}", block)
    done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", script], cwd=tmp_path, env=cases.environment(RANKS="2"),
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    if TRAINS.search(block):
        assert (tmp_path / "out" / "record.json").exists() and "loss" in done.stdout + done.stderr
    if "block_size" in block:
        assert "on nvme" not in done.stdout and "swap files" not in done.stdout
    if "max_in_cpu" in block:
        assert re.search(r"parameter on host +8\.40", done.stdout) and re.search(r"parameter on nvme +8\.39", done.stdout)


def test_the_first_command_is_shown_and_trains():
    assert TRAINS.fullmatch(BLOCKS[0].strip())
