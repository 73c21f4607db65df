"""The first command of pipedream/README.md, at toy size."""

import json
import os
import re
import subprocess
import sys

from yardstick.results import ROOT


def test_first_command(tmp_path):
    text = (ROOT / "pipedream" / "README.md").read_text()
    first = re.search(r"```bash\n([^\n#]*)", text)[1].split()
    assert first == ["python", "pipedream/pipedream_simple.py"]
    done = subprocess.run([sys.executable, first[1], "steps=2", "micro_batches=4", "layers=2", "hidden=16", "heads=2", "seq=16", f"output={tmp_path}"],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu", "RANKS": "2", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal in every bit" in done.stdout and "versions held by rank 1: 1" in done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["run"] == "pipedream/pipedream_simple" and record["settings"]["mode"] == "stash" and record["machine"]["ranks"] == 2
    assert record["measured"]["versions_count"] == 2 and record["measured"]["weights_apart_ratio_max"] == 0
    events = record["details"]["events"]                            # rows that a page can play
    assert [len(rank) for rank in events] == [16, 16] and min(row[3] for rank in events for row in rank) == 0
    assert all(row[0] in "FB" and row[3] < row[4] for rank in events for row in rank)
