"""The call tracer counts what is entered, in the phase and from the line that it says."""

import importlib.util
import sys
import textwrap

import pytest

from yardstick.call_trace import CallTrace


@pytest.fixture
def program(tmp_path):
    """(folder of a small package, its module, path of a script that calls it, the script's main)."""
    package, script = tmp_path / "small", tmp_path / "script.py"
    package.mkdir()
    (package / "engine.py").write_text(textwrap.dedent("""
        import functools
        def wrap(function):
            @functools.wraps(function)
            def wrapped(*a):
                return function(*a)
            return wrapped
        def helper():
            return [x for x in range(3)]
        class Engine:
            @wrap
            def step(self):
                return helper()
            def run(self, callback):
                def inner():
                    return callback()
                return inner()
            def fail(self):
                raise KeyError
        """))
    script.write_text(textwrap.dedent("""
        def main(engine):
            engine.step()
            engine.run(engine.step)
            try:
                engine.fail()
            except KeyError:
                pass
            engine.step()
        """))

    def load(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return package, load(package / "engine.py"), script, load(script).main


def test_counts_phases_and_lines(program):
    package, module, script, main = program
    phases = {"engine.py:Engine.step": "step", "engine.py:Engine.run": "run", "engine.py:Engine.fail": "fail"}
    with CallTrace(package, phases, str(script)) as trace:
        main(module.Engine())
    assert sys.getprofile() is None
    step, inside = trace.entered["step"], trace.entered["run"]
    assert list(step) == ["engine.py:Engine.step", "engine.py:helper"]           # the order of the first entry
    assert step["engine.py:helper"] == step["engine.py:Engine.step"] == [1, 1, 1]
    assert list(inside) == ["engine.py:Engine.run", "engine.py:Engine.run.inner", "engine.py:wrap.wrapped"]
    assert trace.entered["fail"] == {"engine.py:Engine.fail": [1]}               # a phase ends when it raises, too
    assert trace.entered[""] == {"engine.py:wrap.wrapped": [2]}
    assert trace.lines["engine.py:helper"] == {3, 4, 9} and trace.lines["engine.py:Engine.fail"] == {6}


def test_a_call_without_an_entry_counts_as_none(program):
    package, module, _, _ = program
    with CallTrace(package, {"engine.py:Engine.run": "run"}) as trace:
        module.Engine().run(int)
        module.Engine().run(module.helper)
        module.Engine().run(int)
    assert trace.entered["run"]["engine.py:helper"] == [0, 1]
    assert trace.entered["run"]["engine.py:Engine.run"] == [1, 1, 1]
