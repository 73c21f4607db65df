"""The cache of C++ ops: who builds, who waits, what a killed build leaves, what to install; none is compiled."""

import os
import signal
import subprocess
import sys
import time

import pytest

from yardstick import op_cache

# Holds the builder's lock with torch's file `lock` inside, as a build does; ends well, or when it is killed.
BUILDER = """
import fcntl, pathlib, sys, time
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
with open(folder / "builder", "a+") as holder:
    fcntl.flock(holder, fcntl.LOCK_EX)
    for op in ("pin_memory", "async_io"):
        (folder / op).mkdir(exist_ok=True)
        (folder / op / "lock").touch()
    print("building", flush=True)
    time.sleep(seconds)
    for op in ("pin_memory", "async_io"):
        (folder / op / (op + ".so")).touch()
        (folder / op / "done").write_text("0 bytes")
        (folder / op / "lock").unlink()
"""


def library(folder, op, done=True):
    (folder / op).mkdir(parents=True, exist_ok=True)
    (folder / op / f"{op}.so").touch()
    if done:
        (folder / op / "done").write_text("0 bytes, built and loaded")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, in which a build takes no time; cache.built and cache.said are what happened."""
    folder = tmp_path / "cpp_ops"
    folder.mkdir()

    class Cache:
        path, built, said = folder, [], []

        def prepare(self, *ops):
            op_cache.prepare(list(ops), say=self.said.append)
    cache = Cache()

    def build(op, say, holder):
        assert not list(folder.glob("*/lock")), "torch would wait for ever"
        cache.built.append(op)
        library(folder, op)
    monkeypatch.setattr(op_cache, "folder", lambda: folder)
    monkeypatch.setattr(op_cache, "_build", build)
    monkeypatch.setattr(op_cache, "missing_tools", lambda ops: None)
    return cache


def test_what_is_missing_is_built_once_and_pins_come_first(cache):
    assert not op_cache.ready(["async_io"])
    cache.prepare("async_io")
    assert cache.built == ["pin_memory", "async_io"] and op_cache.ready(["async_io"])
    cache.prepare("async_io")
    cache.prepare("cpu_adam", "async_io")
    assert cache.built == ["pin_memory", "async_io", "cpu_adam"]


def test_nothing_is_needed_for_nothing(cache):
    cache.prepare()
    assert op_cache.ready([]) and not cache.built and not list(cache.path.iterdir())


def test_a_library_cut_short_is_none(cache):
    library(cache.path, "cpu_adam")
    assert op_cache.ready(["cpu_adam"])
    (cache.path / "cpu_adam" / "done").write_text("1 bytes, built and loaded")       # loading it would end in SIGBUS
    assert not op_cache.ready(["cpu_adam"])


def test_a_build_that_did_not_finish_is_none(cache):
    library(cache.path, "cpu_adam", done=False)
    assert not op_cache.ready(["cpu_adam"])
    cache.prepare("cpu_adam")
    assert cache.built == ["cpu_adam"]
    (cache.path / "cpu_adam" / "cpu_adam.so").unlink()           # nor is a note without a library
    assert not op_cache.ready(["cpu_adam"])


def test_async_io_needs_its_pins(cache):
    library(cache.path, "async_io")
    assert not op_cache.ready(["async_io"])
    cache.prepare("async_io")
    assert cache.built == ["pin_memory"]


def test_a_lock_left_by_a_killed_build_is_named_and_removed(cache):
    library(cache.path, "pin_memory", done=False)
    (cache.path / "pin_memory" / "lock").touch()
    cache.prepare("async_io")
    said, = [line for line in cache.said if "lock" in line]
    assert str(cache.path / "pin_memory" / "lock") in said and "killed" in said
    assert cache.built == ["pin_memory", "async_io"]


def start_builder(cache, seconds):
    builder = subprocess.Popen([sys.executable, "-c", BUILDER, str(cache.path), str(seconds)],
                               stdout=subprocess.PIPE, text=True)
    assert builder.stdout.readline() == "building\n"
    return builder


def test_a_living_builder_is_waited_for_and_its_result_taken(cache):
    builder = start_builder(cache, 1.5)
    begin = time.monotonic()
    cache.prepare("async_io")
    waited = time.monotonic() - begin
    assert builder.wait() == 0 and not cache.built and waited > 1
    said, = cache.said
    assert "another process builds" in said and "waiting" in said


def test_a_builder_that_is_killed_is_not_waited_for(cache):
    builder = start_builder(cache, 600)
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert (cache.path / "async_io" / "lock").exists()
    cache.prepare("async_io")
    assert cache.built == ["pin_memory", "async_io"]
    assert len([line for line in cache.said if "removing" in line]) == 2


def test_a_wait_ends_when_the_builder_is_killed(cache):
    builder = start_builder(cache, 600)
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({builder.pid}, 9)"])
    cache.prepare("async_io")
    assert "another process builds" in cache.said[0]
    assert cache.built == ["pin_memory", "async_io"]
    killer.wait()
    builder.wait()


def test_a_build_that_fails_says_where_its_log_is(monkeypatch, tmp_path):
    monkeypatch.setattr(op_cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(op_cache, "missing_tools", lambda ops: None)
    monkeypatch.setattr(sys, "executable", compiler(tmp_path / "python", "echo unknown type name; exit 7"))
    said = []
    with pytest.raises(op_cache.OpError) as caught:
        op_cache.prepare(["cpu_adam"], say=said.append)
    message = str(caught.value)
    assert "building DeepSpeed's cpu_adam failed (exit code 7)" in message and "unknown type name" in message
    assert str(tmp_path / "cpu_adam.log") in message and not op_cache.ready(["cpu_adam"])
    assert any("building DeepSpeed's C++ op cpu_adam" in line for line in said)


def compiler(path, script):
    """A program at `path` that runs `script`."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("environment", [{"PATH": ""}, {"CXX": "/no/such/compiler"}, {"CXX": "no-such-compiler"}])
def test_without_a_compiler(monkeypatch, tmp_path, environment):
    monkeypatch.setattr(op_cache, "folder", lambda: tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(op_cache.OpError) as caught:
        op_cache.prepare(["async_io"])
    message = str(caught.value)
    assert environment.get("CXX", "c++") in message and "apt-get install g++" in message and "async_io" in message
    assert not list(tmp_path.iterdir())


def test_without_the_headers_of_libaio(monkeypatch, tmp_path):
    # fails on what includes the header, as a compiler does where it is missing
    monkeypatch.setenv("CXX", compiler(tmp_path / "c++", "! grep -q libaio.h"))
    message = op_cache.missing_tools(["async_io"])
    assert "libaio-dev" in message and "strategy=offload" in message
    assert op_cache.missing_tools(["cpu_adam"]) is None
    monkeypatch.setenv("CXX", compiler(tmp_path / "c++", "exit 0"))
    assert op_cache.missing_tools(["async_io"]) is None


def test_what_the_real_compiler_says_of_a_missing_header(monkeypatch):
    if op_cache.missing_tools(["async_io"]):
        pytest.skip("this machine has no compiler, or no libaio")
    monkeypatch.setenv("CFLAGS", "-nostdinc")
    assert "libaio-dev" in op_cache.missing_tools(["async_io"])


def test_no_such_op(cache):
    with pytest.raises(op_cache.OpError, match="no such op: gpu_adam. Ops: pin_memory, async_io"):
        cache.prepare("gpu_adam")


def loading(folder):
    """Rank that loads what is not built."""
    from pathlib import Path
    op_cache.folder = lambda: Path(folder)

    def rank():
        try:
            op_cache.load(["async_io"])
        except op_cache.OpError as error:
            return str(error)
    return rank


def test_loading_what_is_not_built_names_the_command(launch, tmp_path):
    assert "python -m yardstick.op_cache pin_memory" in launch(loading, tmp_path, ranks=1).good()[0]


def test_the_cache_is_one_machines_and_one_releases():
    from importlib.metadata import version
    name = op_cache.folder().name
    assert version("torch") in name and version("deepspeed") in name and sys.implementation.cache_tag in name
    assert op_cache.folder().is_relative_to(op_cache.ROOT / "runs")


def test_the_command(tmp_path):
    environment = {**os.environ, "CXX": "/no/such/compiler"}
    ended = subprocess.run([sys.executable, "-m", "yardstick.op_cache", "no_such_op"], cwd=op_cache.ROOT,
                           env=environment, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("op_cache: no such op: no_such_op")
