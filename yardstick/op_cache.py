"""DeepSpeed's C++ ops: built once, by one process, into a cache under runs/, and loaded without a lock.

DeepSpeed compiles an op where it is first used, in every rank, behind a file called `lock`. A process that is
killed meanwhile leaves that file, and every later start waits for it in silence (torch.utils.file_baton). Here

    prepare(["async_io"])     builds what is missing before any rank starts, under a lock that the operating
                              system releases when its holder dies, removing a `lock` whose builder is dead;
    load(["async_io"])        gives a rank the finished libraries, so that DeepSpeed neither builds nor waits.

`python -m yardstick.op_cache async_io cpu_adam` does the first by hand.
"""

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from yardstick.ranks import ROOT, processor

# what DeepSpeed calls the builder of each op; pin_memory comes first because async_io links against it
BUILDERS = {"pin_memory": "PinMemoryBuilder", "async_io": "AsyncIOBuilder", "cpu_adam": "CPUAdamBuilder",
            "fused_adam": "FusedAdamBuilder"}


class OpError(RuntimeError):
    """An op that this machine cannot have; the text says what to install."""


def folder():
    """The cache of this torch, DeepSpeed, Python and processor: a library of another one would not load."""
    from importlib.metadata import version
    torch_version, tag = version("torch"), sys.implementation.cache_tag
    key = hashlib.sha256(processor().encode()).hexdigest()[:8]
    return ROOT / "runs" / "cache" / "cpp_ops" / f"torch{torch_version}-ds{version('deepspeed')}-{tag}-{key}"


def _library(op):
    found = sorted((folder() / op).glob(f"{op}*.so"))
    return found[0] if found else None


def ready(ops):
    """True when every op has its finished library; the build writes `done` after a load that worked."""
    return all(_complete(op) for op in _with_pins(ops))


def _complete(op):
    done, library = folder() / op / "done", _library(op)
    return library is not None and done.exists() and done.read_text(errors="replace").split()[:1] == [str(library.stat().st_size)]


def _with_pins(ops):
    wanted = set(ops) | ({"pin_memory"} if "async_io" in ops else set())
    unknown = wanted - set(BUILDERS)
    if unknown:
        raise OpError(f"no such op: {', '.join(sorted(unknown))}. Ops: {', '.join(BUILDERS)}.")
    return [op for op in BUILDERS if op in wanted]


def missing_tools(ops):
    """What the build of `ops` needs and this machine lacks, as one sentence, or None."""
    compiler = os.environ.get("CXX") or "c++"
    if not shutil.which(compiler):
        return (f"building {', '.join(_with_pins(ops))} needs a C++ compiler and `{compiler}` is not on PATH. "
                "Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++).")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return (f"building {', '.join(_with_pins(ops))} needs Python.h, which is not in {sysconfig.get_path('include')}. Install the "
                "headers of this Python (Debian, Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel).")
    if "async_io" in ops:
        probe = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }\n"
        extra = os.environ.get("CFLAGS", "").split() + ["-x", "c++", "-", "-o", os.devnull]
        extra += os.environ.get("LDFLAGS", "").split() + ["-laio"]
        if subprocess.run([compiler, *extra], input=probe, text=True, capture_output=True).returncode:
            return ("the NVMe strategy needs the headers of libaio, and a program that includes <libaio.h> does "
                    "not compile here. Install them (Debian, Ubuntu: apt-get install libaio-dev; Fedora: dnf "
                    "install libaio-devel), or use strategy=offload, which needs neither.")
    return None


def prepare(ops, say=print):
    """Build what is missing of `ops`; returns at once when all of it is there. Raises OpError.

    One builder at a time: a second caller waits for the first, saying so, and then uses its result.
    """
    if ready(ops):
        return
    lacking = missing_tools(ops)
    if lacking:
        raise OpError(lacking)
    folder().mkdir(parents=True, exist_ok=True)
    with open(folder() / "builder", "a+") as holder:
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process builds DeepSpeed's C++ ops in {_shown(folder())}; waiting for it")
            fcntl.flock(holder, fcntl.LOCK_EX)          # released by the system when that process ends
        clear_stale_locks(say)
        for op in _with_pins(ops):
            if not _complete(op):
                _build(op, say, holder)


def clear_stale_locks(say=print):
    """Remove `lock` files of dead builders. To be called by the one who holds the builder's lock.

    Whoever holds that lock is the only builder of this cache, so any `lock` found is left over.
    """
    for lock in sorted(folder().glob("*/lock")):
        say(f"removing {_shown(lock)}, left by a build that was killed: torch would wait for it for ever")
        lock.unlink(missing_ok=True)


def _shown(path):
    """A path as the user knows it: relative to the repository where it lies inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _build(op, say, holder):
    shutil.rmtree(folder() / op, ignore_errors=True)    # objects of a killed build can be cut short
    log = folder() / f"{op}.log"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder()), "MAX_JOBS": str(os.cpu_count() or 1)}
    say(f"building DeepSpeed's C++ op {op}, once for this machine (one to four minutes); log: {_shown(log)}")
    started = time.monotonic()
    with open(log, "w") as out:
        child = subprocess.Popen([sys.executable, "-m", "yardstick.op_cache", "--compile", op], cwd=ROOT, stdout=out,
                                 stderr=subprocess.STDOUT, env=environment,
                                 pass_fds=[holder.fileno()])    # a build that outlives us keeps the lock
        shown = sys.stderr.isatty()
        while child.poll() is None:
            time.sleep(0.5)
            seconds = time.monotonic() - started
            if shown:
                print(f"\r  {op}: {seconds:4.0f} s", end="", file=sys.stderr, flush=True)
            elif int(seconds) and int(seconds) % 20 == 0 and seconds % 1 < 0.5:
                say(f"  {op}: {seconds:.0f} s")
        if shown:
            print(file=sys.stderr)
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise OpError(f"building DeepSpeed's {op} failed (exit code {child.returncode}); the whole log is {log}. "
                      f"Its end:\n{tail}")
    say(f"  {op}: built in {time.monotonic() - started:.0f} s")


def _compile(op):
    import deepspeed.ops.op_builder  # noqa: F401  sets up the builders' package
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension
    # torch quotes the folders of headers and not this one, so a checkout whose path has a space would not link
    cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)
    if op == "async_io":
        load(["pin_memory"])
    get_accelerator().create_op_builder(BUILDERS[op]).load(verbose=True)
    (folder() / op / "done").write_text(f"{_library(op).stat().st_size} bytes, built and loaded\n")


def load(ops):
    """Put finished libraries where DeepSpeed's builders look first, in this process: no ninja, no lock.

    OpBuilder.load returns what stands in OpBuilder._loaded_ops (ops/op_builder/builder.py).
    """
    from torch.utils.cpp_extension import _import_module_from_library

    from deepspeed.ops.op_builder.builder import OpBuilder
    for op in _with_pins(ops):
        library = _library(op)
        if library is None:
            raise OpError(f"DeepSpeed's C++ op {op} is not built. Run: python -m yardstick.op_cache {op}")
        module = _import_module_from_library(op, str(folder() / op), True)
        OpBuilder._loaded_ops[op] = module
        if op == "pin_memory":                           # async_io finds its symbols in the global table
            sys._deepspeed_pin_memory_op_module = module
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def do_without(op="deepspeed_shm_comm"):
    """Keep DeepSpeed from compiling an op that training never calls.

    init_distributed builds deepspeed_shm_comm on a CPU; only inference_all_reduce uses it (comm/torch.py).
    """
    import deepspeed
    deepspeed.ops.__compatible_ops__[op] = False


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        _compile(sys.argv[2])
    else:
        try:
            prepare(sys.argv[1:] or ["async_io"])
        except OpError as error:
            sys.exit(f"op_cache: {error}")
        print(f"ready in {_shown(folder())}")
