"""env.sh in small copies of the checkout: what it finds, what it makes, and what it says when it cannot.

The copies ask for packages of a few bytes, made here as wheels, so real pip and real environments take seconds and
no network. PATH holds nothing but what a test puts there.
"""

import doctest
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

import env_setup

ROOT = Path(__file__).resolve().parent.parent
BASE = getattr(sys, "_base_executable", sys.executable)
FOLDERS = {"1_data_parallel": "dp", "2_zero_stage1": "zero1", "3_zero_stage2": "zero2", "4_zero_stage3": "zero3",
           "5_zero_offload": "offload", "6_zero_infinity": "infinity"}

pytestmark = pytest.mark.skipif(os.name == "nt", reason="env.sh is tested under bash on Linux and macOS")


def wheel(folder, name, version, requires=(), files=()):
    """Writes a wheel with the given {path: text}; the least that pip installs."""
    from pathlib import Path
    import zipfile
    file = f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = dict(files)
    files[f"{info}/METADATA"] = "\n".join(
        ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "Provides-Extra: dev"]
        + [f"Requires-Dist: {r}" for r in requires]) + "\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(Path(folder, file), "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return file


BACKEND = inspect.getsource(wheel) + '''

def build_editable(folder, config_settings=None, metadata_directory=None):
    import os
    return wheel(folder, "reference", "1.0", ["torch", "deepspeed"], {"reference.pth": os.getcwd()})
'''
PYPROJECT = '''
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "reference"
requires-python = ">=3.11"
dependencies = ["torch>=2.9", "deepspeed>=0.19.8,<0.20"]
[project.optional-dependencies]
dev = []
'''
PROGRAM = 'import os, sys; print("ran", sys.argv[1:], os.getcwd(), sys.executable, sep="|")\n'


@pytest.fixture
def checkout(tmp_path):
    """A copy with a space in its path, an index of small wheels beside it, and a bin/ that is the whole PATH."""
    copy, links, tools = tmp_path / "my checkout", tmp_path / "wheels", tmp_path / "bin"
    for folder in FOLDERS:
        (copy / "strategies" / folder).mkdir(parents=True)
        shutil.copy(ROOT / "strategies" / folder / "run.sh", copy / "strategies" / folder)
    for file in ("env.sh", "env_setup.py"):
        shutil.copy(ROOT / file, copy)
    (copy / "pyproject.toml").write_text(PYPROJECT)
    (copy / "backend.py").write_text(BACKEND)
    (copy / "constraints.txt").write_text("torch==2.13.0\ndeepspeed==0.19.8\n")
    (copy / "real_model_example.py").write_text(PROGRAM)
    links.mkdir(), tools.mkdir()
    wheel(links, "torch", "2.13.0", files={"torch.py": ""})
    wheel(links, "deepspeed", "0.19.8", ["transformers", "matplotlib"], {"deepspeed.py": ""})
    wheel(links, "transformers", "5.0", files={"transformers.py": ""})
    wheel(links, "matplotlib", "3.9", files={"matplotlib/__init__.py": "", "matplotlib/pyplot.py": ""})
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    return copy


@pytest.fixture
def pip_wheel(checkout):
    """Puts this environment's own pip into the index of small wheels, since env_setup.py wants a recent one."""
    pip = importlib.metadata.distribution("pip") if importlib.util.find_spec("pip") else None
    if pip is None or not env_setup.satisfies(pip.version, ">=24.1"):
        pytest.skip("this environment has no pip of 24.1 or newer to make a wheel of")
    if importlib.util.find_spec("ensurepip") is None:
        pytest.skip("this Python has no venv module")
    with zipfile.ZipFile(checkout.parent / "wheels" / f"pip-{pip.version}-py3-none-any.whl", "w") as archive:
        for file in pip.files:
            if not str(file).startswith("..") and "__pycache__" not in str(file):
                archive.write(pip.locate_file(file), str(file))
    python(checkout, "python3", f'exec "{BASE}" "$@"')


def python(checkout, name, script):
    """Puts a shell script named like a Python on PATH."""
    file = checkout.parent / "bin" / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def environment(checkout, **extra):
    """Variables of a start: PATH of the test alone, small wheels for an index, no way to the network."""
    parent = checkout.parent
    own = dict(PATH=str(parent / "bin"), HOME=str(parent), LANG="C.UTF-8", https_proxy="http://127.0.0.1:9",
               PIP_CONFIG_FILE="/dev/null", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(parent / "wheels"))
    return {**own, **extra}


def start(checkout, *arguments, folder="3_zero_stage2", cwd=None, **extra):
    return subprocess.Popen(
        ["bash", str(checkout / "strategies" / folder / "run.sh"), *arguments], cwd=cwd or checkout.parent,
        env=environment(checkout, **extra), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)


def run(checkout, *arguments, **extra):
    """(exit code, what the program printed, what env.sh said)."""
    process = start(checkout, *arguments, **extra)
    out, said = process.communicate(timeout=120)
    return process.returncode, out, said


def test_doctests():
    assert doctest.testmod(env_setup).failed == 0


def test_run_sh_differ_in_the_strategy_alone():
    texts = {name: (ROOT / "strategies" / folder / "run.sh").read_text() for folder, name in FOLDERS.items()}
    assert len({re.sub(r"strategy=\w+", "", text) for text in texts.values()}) == 1
    for name, text in texts.items():
        assert f"strategy={name} " in text and len(text.splitlines()) == 5
    for file in [".ci/run", "run_tests.sh", *(f"strategies/{folder}/run.sh" for folder in FOLDERS)]:
        assert os.access(ROOT / file, os.X_OK), file
        subprocess.run(["bash", "-n", str(ROOT / file)], check=True)


def test_constraints_meet_the_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
             and not line.startswith("#")]
    exact = {name.lower().replace("_", "-"): version for name, version in lines}
    for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
        name, ranges = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
        assert env_setup.satisfies(exact[name], ranges), requirement


def active(checkout, **versions):
    """An environment folder whose Python sees exactly these distributions besides its own."""
    folder = checkout.parent / "active"
    for name, version in versions.items():
        info = folder / "site" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}/site:$PYTHONPATH" exec "{BASE}" "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_that_satisfies_is_used_as_it_is(checkout, variable):
    folder = active(checkout, torch="2.13.0+cpu", deepspeed="0.19.9")
    show = "import os; print(os.environ['PYTHON'], os.environ['PYTHONPATH'])"
    (checkout / "real_model_example.py").write_text(show)
    code, out, said = run(checkout, **{variable: str(folder)})
    assert (code, said) == (0, "")
    assert str(folder / "bin" / "python") in out and str(checkout) in out
    assert not (checkout / ".venv").exists() and not (checkout / "runs").exists()


def test_a_python_on_path_that_satisfies_is_used(checkout):
    folder = active(checkout, torch="2.9.0a0+145a3a7", deepspeed="0.19.8")
    python(checkout, "python", "exit 127")                # a shim that does not run
    python(checkout, "python3", f'exec "{folder}/bin/python" "$@"')
    assert run(checkout)[0] == 0
    assert not (checkout / ".venv").exists()


def test_an_active_environment_that_lacks_something_is_named(checkout):
    folder = active(checkout, torch="2.4.1", deepspeed="0.20.0")
    code, out, said = run(checkout, VIRTUAL_ENV=str(folder))
    assert code != 0 and out == ""                        # and there is no Python to make .venv from
    assert f"{folder} lacks torch>=2.9 (it has 2.4.1), deepspeed>=0.19.8,<0.20 (it has 0.20.0)" in said


def test_no_python(checkout):
    code, out, said = run(checkout)
    assert code != 0 and out == ""
    assert "no Python is found on PATH. Install Python 3.11" in said


def test_too_old_a_python(checkout):
    python(checkout, "python3", 'case "$*" in *"<"*) exit 3 ;; *print*) echo 3.8 ;; *) exit 1 ;; esac')
    code, _, said = run(checkout)
    assert code != 0 and "too old: python3 is 3.8; 3.11 or newer" in said


def test_no_venv_module(checkout):
    python(checkout, "python3", 'case "$*" in *"<"*) exit 4 ;; *print*) echo python3.12-venv ;; *) exit 1 ;; esac')
    code, _, said = run(checkout)
    assert code != 0 and "apt-get install python3.12-venv" in said


def test_no_disk(monkeypatch):
    monkeypatch.setattr(env_setup.shutil, "disk_usage", lambda place: types.SimpleNamespace(free=1e9))
    with pytest.raises(env_setup.SetupError, match=r"1.0 GB are free in .*, the environment needs 2.0 GB"):
        env_setup.check_room("cpu")


@pytest.mark.parametrize("output, cause", [
    ("connection broken by 'NewConnectionError'\nERROR: No matching distribution found for torch", "no network"),
    ("ERROR: Could not install packages: [Errno 28] No space left on device", "the disk is full"),
    ("connection broken by 'SSLError(CERTIFICATE_VERIFY_FAILED)'", "PIP_CERT"),
    ("ERROR: No matching distribution found for torch==2.13.0", "no such package for Python"),
])
def test_why_pip_failed(output, cause):
    assert cause in env_setup.explain("torch", output)


def test_no_network(checkout):
    if importlib.util.find_spec("ensurepip") is None:
        pytest.skip("this Python has no venv module")
    python(checkout, "python3", f'exec "{BASE}" "$@"')
    code, out, said = run(checkout, PIP_NO_INDEX="0", PIP_FIND_LINKS="", PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert code != 0 and out == ""
    assert "no network: pip cannot reach a package index" in said


def test_made_once_then_found_at_once(checkout, pip_wheel):
    code, out, said = run(checkout, "data=a b", "steps=3")
    assert code == 0, said
    venv = checkout / ".venv"
    assert f"ran|['strategy=zero2', 'data=a b', 'steps=3']|{checkout.parent}|{venv}/bin/python" in out
    assert re.search(r"env.sh: 4/6 torch, CPU build  \d+ s  done", said) and ".venv is ready after" in said
    stamp = json.loads((venv / "complete.json").read_text())
    assert stamp["place"] == str(checkout) and stamp["build"] == "cpu"

    times = []
    for folder, strategy in FOLDERS.items():              # from the strategy's own folder as well
        begin = time.monotonic()
        code, out, said = run(checkout, folder=folder, cwd=checkout / "strategies" / folder)
        times.append(time.monotonic() - begin)
        assert (code, said) == (0, "") and f"strategy={strategy}" in out
    assert min(times) < 1

    # Changed constraints are taken up in place; the environment is not made anew.
    marker = venv / "marker"
    marker.touch()
    wheel(checkout.parent / "wheels", "torch", "2.14.0", files={"torch.py": ""})
    (checkout / "constraints.txt").write_text("torch==2.14.0\ndeepspeed==0.19.8\n")
    code, out, said = run(checkout)
    assert code == 0 and "up to date" in said and marker.exists()
    assert list(venv.glob("lib/*/site-packages/torch-2.14.0.dist-info"))


def test_killed_in_the_middle_then_two_at_once(checkout, pip_wheel):
    first = start(checkout)
    deadline = time.monotonic() + 60
    while not (checkout / ".venv" / "bin" / "python").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(int((checkout / "runs" / "env.lock").read_text()), signal.SIGKILL)
    _, said = first.communicate(timeout=60)
    assert first.returncode != 0 and "making" in said     # run.sh ends with its set-up
    (checkout / ".venv" / "half").touch()

    both = [start(checkout, "n=1"), start(checkout, "n=2", folder="6_zero_infinity")]
    results = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert sorted("making" in said for _, said in results) == [False, True]      # one makes it, the other waits
    assert any("waiting for another set-up here" in said for _, said in results)
    assert "'n=1'" in results[0][0] and "'n=2'" in results[1][0]
    assert not (checkout / ".venv" / "half").exists()     # made anew, not mended


def test_cuda_is_not_installed_where_there_is_no_gpu(checkout, pip_wheel):
    if sys.platform != "linux":
        pytest.skip("wheels with CUDA libraries exist for Linux")
    wheel(checkout.parent / "wheels", "torch", "2.13.0", ["nvidia-cublas; python_version > '3'", "triton==3.7"])
    code, out, said = run(checkout)
    assert code != 0 and out == ""
    assert "no CPU build of torch 2.13.0" in said and "2 packages of libraries" in said
    assert "TORCH_BUILD=cuda" in said
    assert not list((checkout / ".venv").glob("lib/*/site-packages/torch*"))
