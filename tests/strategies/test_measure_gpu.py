"""strategies/measure_gpu.sh: what it says without a GPU, and its search, its outcomes and its records rehearsed on the CPU."""

import json
import subprocess
import sys
import zipfile

import pytest

from strategies import measure_gpu
from tests.strategies import cases

SCRIPT = "strategies/measure_gpu.sh"


def test_no_gpu_is_one_message(tmp_path):
    ended = cases.command(["bash", SCRIPT, f"output={tmp_path / 'records'}"], NO_ENV="1", DS_ACCELERATOR="", CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 1 and ended.stdout == "" and len(ended.stderr.splitlines()) == 1
    assert "finds no GPU here" in ended.stderr and "DS_ACCELERATOR=cpu" in ended.stderr
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("argument, words", [
    ("strategies=zero2,zero", ["zero is none of dp, zero1", "Did you mean zero"]), ("ladder=2x65", ["ladder=2x65", "multiple of 64"]),
    ("modelz=gpt2", ["unknown setting modelz=gpt2", "Did you mean models?"]), ("record=A B", ["'A B'", "a-z"])])
def test_bad_settings_are_refused(tmp_path, argument, words):
    ended = cases.command([sys.executable, "strategies/measure_gpu.py", f"output={tmp_path}", "models=", argument])
    assert ended.returncode == 1 and all(word in ended.stderr for word in words), ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_torch_says_without_memory_is_known():
    ended = subprocess.run([sys.executable, "-c", "import torch; torch.empty(2**60)"], capture_output=True, text=True)
    assert measure_gpu.outcome_of(ended.returncode, ended.stderr) == "out of memory"


def test_wheels_are_taken_from_a_folder(tmp_path):
    """In place of the installed package; what they need is not looked for."""
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("psutil.py", "raise SystemExit('the carried one')\n")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\nRequires-Dist: absent\n")
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    site = cases.ROOT / "runs" / "measure_gpu" / "site"
    try:
        ended = cases.command(["bash", SCRIPT, f"output={tmp_path / 'records'}"], PYTHON=sys.executable, WHEELS=str(tmp_path))
    finally:
        subprocess.run(["rm", "-rf", str(site)], check=True)
    assert ended.returncode == 1 and ended.stderr.strip().endswith("the carried one"), ended.stderr


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu(models, tmp_path):
    """The limit of memory is real: the second model of the ladder cannot be built within it."""
    words = ["bash", SCRIPT, f"output={tmp_path}", f"models={models['small']}", "strategies=zero1", "steps=4", "largest_steps=2",
             "ladder=1x64,1x4096", "memory=0.7", "seconds=200"]
    first = cases.command(words, NO_ENV="1")
    assert first.returncode == 0, first.stdout + first.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    outcomes = {name.removesuffix("_zero1"): record["outcome"] for name, record in found.items()}
    small = models["small"].rpartition("/")[2]
    assert outcomes == {small: "ok", "gpt2-1x64": "ok", "gpt2-1x4096": "out of memory"}
    record = found["gpt2-1x64_zero1"]
    assert record["measured"]["device_bytes"] == record["predicted"]["device_bytes"] and record["measured"]["epoch_seconds"] > 0
    assert record["command"].startswith("bash strategies/measure_gpu.sh models=") and not found["gpt2-1x4096_zero1"]["measured"]
    assert f"| gpt2-1x4096 | {measure_gpu._parameters(found['gpt2-1x4096_zero1']) / 1e6:,.0f} | zero1 | 1 x 32 * | out of memory |" in first.stdout
    again = cases.command(words, NO_ENV="1", seconds=60)
    assert again.returncode == 0 and again.stdout.count("recorded before") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.json" for name in found)


@pytest.mark.slow
def test_a_run_has_a_limit(models, tmp_path):
    ended = cases.command(["bash", SCRIPT, f"output={tmp_path}", f"models={models['small']}", "strategies=dp", "steps=100000", "largest=False",
                           "seconds=20"], NO_ENV="1", seconds=100)
    assert ended.returncode == 0 and "_dp: timed out (2" in ended.stdout
    [record] = tmp_path.glob("*.json")
    assert json.loads(record.read_text())["details"] == {"limit_seconds": 20}


def test_machines_without_records_say_so():
    assert measure_gpu.tables("no-such-machine") == measure_gpu.NOT_RUN
