"""Checks an environment against pyproject.toml and makes .venv from constraints.txt; env.sh calls it.

    python env_setup.py check [extra ...]   exit 0: this interpreter satisfies the ranges; 3: prints what it lacks
    python env_setup.py ready               exit 0: this interpreter is that of a complete, current .venv
    python env_setup.py make                makes .venv, or mends it; a second caller waits for the first

A .venv is complete when its stamp file stands: written last, removed first. This file has more than 300 lines
because it runs alone, before anything is installed; it uses only the standard library.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "complete.json"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
RUNS = ROOT / "runs"
VERSION = sys.version.split()[0]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Bytes that must be free: where .venv lies, and where pip keeps the wheels that it is about to install. Measured
# with torch 2.13: an environment takes 1.4 GB on a CPU, 5.6 GB with CUDA's libraries; the rest is margin.
NEEDED = {"cpu": (2e9, 0.5e9), "cuda": (7e9, 3e9)}
held = ()                                 # the descriptor of the lock: see lock()


class SetupError(Exception):
    """Set-up cannot go on; the text says why and what to do."""


def say(text):
    print(f"env.sh: {text}", file=sys.stderr, flush=True)


def numbers(version):
    """The release of a version as a tuple; local, pre-release and build parts do not count.

    Vendors' containers name their torch 2.9.0a0+commit: that is a 2.9.

    >>> numbers("2.13.0+cpu"), numbers("2.9.0a0+145a3a7"), numbers("5")
    ((2, 13), (2, 9), (5,))
    """
    release = [int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split(".")]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release)


def satisfies(version, ranges):
    """Whether a version lies in comma-separated ranges.

    >>> satisfies("0.19.8", ">=0.19.8,<0.20"), satisfies("0.20.0", ">=0.19.8,<0.20"), satisfies("1.0", "")
    (True, False, True)
    """
    compare = {">=": tuple.__ge__, "<=": tuple.__le__, ">": tuple.__gt__, "<": tuple.__lt__,
               "==": tuple.__eq__, "!=": tuple.__ne__}
    parts = re.findall(r"(>=|<=|==|!=|>|<)\s*([^,\s]+)", ranges)
    return all(compare[sign](numbers(version), numbers(limit)) for sign, limit in parts)


def lacking(extras=()):
    """The requirements of pyproject.toml that the running interpreter does not satisfy, each with what it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])
    missing = []
    if not satisfies("%d.%d" % sys.version_info[:2], project["requires-python"]):
        missing.append(f"Python {project['requires-python']} (it is {VERSION})")
    for requirement in wanted:
        name, ranges = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
        try:
            version = importlib.metadata.version(name) or ""
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if not version:
            missing.append(f"{requirement} (not installed)")
        elif not satisfies(version, ranges):
            missing.append(f"{requirement} (it has {version})")
    return missing


def nvidia_gpu():
    """Whether nvidia-smi is there and lists a GPU."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
        return listed.returncode == 0 and "GPU" in listed.stdout
    except (OSError, subprocess.TimeoutExpired):
        return False


def torch_build():
    """"cuda" or "cpu": TORCH_BUILD where it is set, else cuda where there is an NVIDIA GPU."""
    asked = os.environ.get("TORCH_BUILD", "")
    if asked not in ("", "cpu", "cuda"):
        raise SetupError(f"TORCH_BUILD={asked} is neither cpu nor cuda.")
    return asked or ("cuda" if nvidia_gpu() else "cpu")


def identity():
    """What .venv depends on: where it lies (it holds paths), Python, and the two files it is made from."""
    files = (ROOT / "constraints.txt").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    return {"place": str(ROOT), "python": "%d.%d" % sys.version_info[:2],
            "content": hashlib.sha256(files).hexdigest()}


def read_stamp():
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def ready():
    """Whether .venv, whose interpreter runs this, is complete, current and has the torch for this machine."""
    stamp = read_stamp()
    if any(stamp.get(key) != value for key, value in identity().items()) or lacking(["dev"]):
        return False
    if "TORCH_BUILD" in os.environ:
        return stamp["build"] == torch_build()
    # Asking nvidia-smi takes seconds on some machines, so it is asked only where a driver has been loaded since.
    return stamp["build"] == "cuda" or not os.path.exists("/proc/driver/nvidia/version") or not nvidia_gpu()


@contextlib.contextmanager
def lock():
    """Holds the set-up lock of this checkout; waits, saying so, while another process sets up.

    The system frees the lock when its holder dies, however it dies. Commands started under it inherit it, so the
    pip of a killed set-up keeps others waiting until it has ended too and no longer writes into .venv.
    """
    global held
    RUNS.mkdir(exist_ok=True)
    with open(RUNS / "env.lock", "a+") as file:           # not in .venv, which is removed and made anew under it
        start, said = time.monotonic(), 0
        while True:
            try:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = (file.fileno(),)
                break
            except BlockingIOError:
                waited = time.monotonic() - start
                if waited >= said:                        # at 0, 10, 20 ... seconds
                    said += 10
                    file.seek(0)
                    say(f"waiting for another set-up here (process {file.read().strip()}), {waited:.0f} s")
                time.sleep(0.2)
            except (ImportError, OSError):                # Windows, and some network file systems
                say(f"{RUNS} cannot be locked: start no second set-up before this one has ended")
                break
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def explain(title, output):
    """Why a command failed: a sentence where the cause is known, and the last lines it printed."""
    causes = {
        r"No space left on device|Disk quota exceeded":
            "the disk is full: free some space, or let TMPDIR and PIP_CACHE_DIR point to where there is some.",
        r"CERTIFICATE_VERIFY_FAILED":
            "the certificate of the package index is not trusted here: let PIP_CERT name the right one.",
        r"connection broken|NewConnectionError|Max retries exceeded|ReadTimeout|ProxyError":
            "no network: pip cannot reach a package index. Behind a proxy set HTTPS_PROXY; PIP_INDEX_URL names an "
            "index of your own. Then start again.",
        r"No matching distribution|Could not find a version":
            f"the index has no such package for Python {VERSION} here; 3.11 to 3.13 are known to work.",
        "": "the command failed."}
    cause = next(text for pattern, text in causes.items() if re.search(pattern, output))
    return "\n    ".join([f"{title}: {cause}", *output.splitlines()[-12:]])


def latest(output):
    """What a command is at: its last line that tells something; pip's raw progress becomes a percentage.

    >>> latest("Collecting torch\\n  Downloading torch.whl (190 MB)\\nWARNING: slow\\nProgress 95 of 190\\n")
    'Downloading torch.whl (190 MB) 50 %'
    """
    percent = re.search(r"Progress (\d+) of ([1-9]\d*)\n\Z", output)
    noise = r"WARNING|Progress|\s*(Attempting|Found existing|Uninstalling|Successfully uninstalled|$)"
    lines = [line for line in output.splitlines() if not re.match(noise, line)] or [""]
    return lines[-1].strip() + (f" {100 * int(percent[1]) // int(percent[2])} %" if percent else "")


def step(title, command):
    """Runs one command of the set-up; shows what it is at and for how long. Its output lies in runs/env.log."""
    own = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_USER": "0", "PYTHONUNBUFFERED": "1",
           "DS_BUILD_OPS": "0"}           # DeepSpeed's C++ parts are built later, by what needs them
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    log, start, said = RUNS / "env.log", time.monotonic(), 0

    def show(end, text):
        line = f"env.sh: {title}  {time.monotonic() - start:.0f} s  {text}".rstrip()
        if terminal:
            line = "\r\033[K" + line[:shutil.get_terminal_size().columns - 1]
        print(line, end=end, file=sys.stderr, flush=True)

    with open(log, "w") as output:
        process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=inherited | own, pass_fds=held,
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            if terminal:
                show("", latest(log.read_text(errors="replace")))
            elif time.monotonic() - start >= said:        # a log gets a line at the start and every ten seconds
                said += 10
                show("\n", latest(log.read_text(errors="replace"))[:100])
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.25)
    except BaseException:
        process.kill()
        raise
    show("\n", "done" if process.returncode == 0 else "failed")
    if process.returncode != 0:
        raise SetupError(explain(title, log.read_text(errors="replace")))


def check_room(build):
    for place, needed in zip((ROOT, Path(tempfile.gettempdir())), NEEDED[build]):
        free = shutil.disk_usage(place).free
        if free < needed:
            raise SetupError(f"no disk space: {free / 1e9:.1f} GB are free in {place}, the environment needs "
                             f"{needed / 1e9:.1f} GB there. Free some, or activate an environment that has "
                             "what pyproject.toml asks for.")


def cpu_index():
    """pip's arguments for PyTorch's index of CPU wheels; none where it does not answer within seconds."""
    import urllib.request                 # here, since every start of a program imports this file

    try:
        urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5).close()
        return ["--extra-index-url", CPU_INDEX]
    except OSError as error:              # URLError and timeouts are OSErrors
        say(f"{CPU_INDEX} cannot be reached ({getattr(error, 'reason', error)}); "
            "asking this machine's own package index for a CPU build of torch")
        return []


def refuse_cuda(report):
    """Stops before the download if the torch that pip chose pulls CUDA's libraries: gigabytes of no use here."""
    chosen = json.loads(report.read_text())["install"][0]["metadata"]
    libraries = [name for name in chosen.get("requires_dist", ()) if re.match("nvidia|cuda|triton", name)]
    if libraries:
        raise SetupError(
            f"no CPU build of torch {chosen['version']} is found for Python {VERSION}, only one "
            f"with CUDA: {len(libraries)} packages of libraries, gigabytes, and there is no NVIDIA GPU here "
            f"(nvidia-smi lists none). Make {CPU_INDEX} reachable, or name an index or folder with a CPU wheel "
            "by PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, and start again; or take CUDA's: TORCH_BUILD=cuda")


def make():
    build, python, start = torch_build(), BIN / "python", time.monotonic()
    pip = [python, "-m", "pip", "install", "--progress-bar", "raw", "--constraint", "constraints.txt"]
    with lock():
        with contextlib.suppress(OSError):
            if subprocess.run([python, __file__, "ready"], capture_output=True).returncode == 0:
                return                    # whom we waited for has made it
        stamp, wanted = read_stamp(), dict(identity(), build=build)
        STAMP.unlink(missing_ok=True)     # from here to the last line .venv counts as broken
        steps = []                        # (title, command, what follows it)
        if any(stamp.get(key) != wanted[key] for key in ("place", "python", "build")):
            # No stamp: a set-up was killed, and packages may stand half written, which pip does not notice.
            shutil.rmtree(VENV, ignore_errors=True)
            check_room(build)
            say(f"making {VENV} with Python {VERSION}, once: some minutes and {NEEDED[build][0] / 1e9:.0f} GB")
            steps.append(("empty environment", [sys.executable, "-m", "venv", "--clear", VENV], None))
        else:
            say(f"bringing {VENV} up to date with constraints.txt and pyproject.toml")
        # From 24.1 on pip can learn a wheel's requirements without the wheel, and tells its progress to a pipe.
        steps.append(("pip itself", [python, "-m", "pip", "install", "--retries", "2", "pip>=24.1"], None))
        index = cpu_index() if build == "cpu" and sys.platform == "linux" else []
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "torch.json")
            if build == "cpu" and sys.platform == "linux":      # elsewhere the plain wheel is without CUDA
                question = ["--dry-run", "--no-deps", "--ignore-installed", "--retries", "2", "--report", report]
                steps.append(("which torch", pip + question + ["torch"] + index, lambda: refuse_cuda(report)))
            steps += [
                (f"torch, {build.upper()} build", pip + ["torch"] + index, None),
                ("DeepSpeed and the other packages", pip + ["--editable", ".[dev]"], None),
                ("first import", [python, "-c", "import torch, deepspeed, transformers, matplotlib.pyplot"], None)]
            for number, (title, command, then) in enumerate(steps, 1):
                step(f"{number}/{len(steps)} {title}", command)
                if then:
                    then()
        mend_first_lines()
        STAMP.write_text(json.dumps(wanted))
        say(f".venv is ready after {time.monotonic() - start:.0f} s")


def mend_first_lines():
    """Let the shell find Python for programs like `deepspeed`, where the path of .venv has a space.

    pip writes such first lines for its own scripts; DeepSpeed installs ready-made ones, which the system cuts at the space.
    """
    if " " not in str(BIN) or os.name == "nt":
        return
    for path in BIN.iterdir():
        text = b"" if path.is_symlink() or not path.is_file() else path.read_bytes()
        first, _, rest = text.partition(b"\n")
        if first.startswith(b"#!") and first[2:].strip().startswith(os.fsencode(BIN)):
            path.write_bytes(b"#!/bin/sh\n'''exec' \"" + os.fsencode(BIN / "python") + b"\" \"$0\" \"$@\"\n' '''\n" + rest)


def main(command, *arguments):
    if command == "check":
        missing = lacking(arguments)
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        print(", ".join(missing[:3]) + more)
        return 3 if missing else 0
    if command == "ready":
        return 0 if ready() else 1
    try:
        make()
    except SetupError as error:
        say(error)
        return 1
    except OSError as error:
        say(f"cannot set up in {ROOT}: {error}. Where this folder cannot be written, activate an environment that "
            "has what pyproject.toml asks for.")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next start makes .venv anew")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
