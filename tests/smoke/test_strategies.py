"""The first command of each strategy's README, at toy size."""

import re

import pytest

from tests.strategies import cases


@pytest.mark.timeout(1800)                     # infinity compiles async_io the first time
@pytest.mark.parametrize("strategy", [
    "dp", "zero1", "zero3", "offload", "infinity",
    pytest.param("zero2", marks=pytest.mark.slow)])      # tests/strategies/test_launchers.py runs it always
def test_first_command(request, models, tmp_path, strategy):
    if strategy == "infinity":
        request.getfixturevalue("async_io")
    folder = cases.FOLDERS[strategy]
    text = (cases.ROOT / "strategies" / folder / "README.md").read_text()
    first = re.search(r"```bash\n([^\n#]*)", text)[1].split()
    assert first == ["bash", f"strategies/{folder}/run.sh"]
    model = models["wide" if strategy == "infinity" else "small"]
    ended = cases.command([*first, *cases.toy(model, tmp_path / "run")])
    record = cases.record(ended, tmp_path / "run")
    assert record["run"] == f"strategies/{folder}" and record["settings"]["strategy"] == strategy
    assert record["machine"]["ranks"] == 2 and record["command"].startswith(f"bash strategies/{folder}/run.sh ")
    if strategy == "infinity":
        assert not list((tmp_path / "run").rglob("*.swp")), "swap files stay behind"
