"""Records are written whole and read back; what a record must not hold is refused."""

import json
import math
import os
import pathlib
import subprocess

import pytest

from yardstick import results

GOOD = {"settings": {"strategy": "zero2", "data": None}, "measured": {"optimizer_bytes": 12},
        "predicted": {"optimizer_bytes": 12}, "machine": {"accelerator": "none", "ranks": 2},
        "command": "bash strategies/3_zero_stage2/run.sh"}
RUN = "strategies/3_zero_stage2"


def write(root, run=RUN, **changes):
    return results.write(run, **{**GOOD, "root": root, **changes})


def test_record_under_a_label_is_read_back(tmp_path):
    path = write(tmp_path, label="cpu2", details={"loss": [9.25, 8.5], "memory": {0: {"rest": 1}}})
    assert path == tmp_path / "results/cpu2/strategies/3_zero_stage2.json"
    record = results.read(RUN, "cpu2", root=tmp_path)
    assert record["run"] == RUN and record["outcome"] == "ok" and record["machine"]["label"] == "cpu2"
    assert record["machine"]["cpus"] >= 1 and record["versions"]["python"] and "commit" not in record
    assert record["details"] == {"loss": [9.25, 8.5], "memory": {"0": {"rest": 1}}}
    assert list(record)[:3] == ["run", "outcome", "command"]
    text = path.read_text()
    assert text.endswith("}\n") and '"loss": [9.25, 8.5]' in text and "NaN" not in text
    assert [p.name for p in path.parent.iterdir()] == [path.name]   # no temporary file stays
    assert results.read_all(root=tmp_path) == results.read_all("cpu2", "strategies", root=tmp_path) == [record]
    assert results.read_all("gpu1", root=tmp_path) == []


def test_lists_of_numbers_stand_on_one_line_behind_a_word_or_not(tmp_path):
    details = {"rows": [["F", 0, 0.5, 2], ["B", 1, -1e-9, None]], "words": ["F", "B"], "one": ["F"], "text": ["a [b", 1]}
    path = write(tmp_path, details=details)
    assert results.read(path)["details"] == details
    text = path.read_text()
    assert '["F", 0, 0.5, 2]' in text and '["B", 1, -1e-09, null]' in text
    assert '"words": [\n' in text and '"one": [\n' in text and '"text": [\n' in text


def test_record_without_a_label_stays_under_runs(tmp_path):
    first, second = write(tmp_path), write(tmp_path, measured={"optimizer_bytes": 13})
    assert first != second and first.relative_to(tmp_path).parts[0] == "runs" and first.name == "record.json"
    assert results.read(RUN, root=tmp_path)["measured"] == {"optimizer_bytes": 13}   # the newest
    assert results.read(first.parent)["measured"] == results.read(first)["measured"] == {"optimizer_bytes": 12}
    assert write(tmp_path, folder=tmp_path / "mine") == tmp_path / "mine/record.json"


def test_floats_keep_nine_digits_and_arrays_become_lists(tmp_path):
    numpy = pytest.importorskip("numpy")
    loss = numpy.float32(1) / 3
    record = results.read(write(tmp_path, measured={"loss_nats": loss, "step_seconds": 0.12345678901234},
                                details={"loss": numpy.array([1.5, loss])}))
    assert numpy.float32(record["measured"]["loss_nats"]) == loss
    assert record["measured"]["step_seconds"] == 0.123456789 and record["details"]["loss"][0] == 1.5


@pytest.mark.parametrize("changes, says", [
    ({"measured": {"step_seconds": math.nan}}, r"\['measured'\]\['step_seconds'\] is nan"),
    ({"details": {"loss": [1.0, math.inf]}}, r"\['details'\]\['loss'\]\[1\] is inf"),
    ({"details": {"path": pathlib.Path("x")}}, "JSON cannot hold"),
    ({"measured": {"step_time": 1.0}}, "names no unit"),
    ({"estimated": {"activation_bytes": None}}, "not a number"),
    ({"predicted": {"loss_nats": [1.0]}}, "not a number"),
    ({"label": "my machine"}, "record label 'my machine'"),
    ({"run": "../elsewhere"}, "run name"),
    ({"run": "/elsewhere"}, "run name"),
    ({"run": "a/../b"}, "run name"),
    ({"label": "cpu2", "settings": {"data": os.path.expanduser("~/corpus")}}, "holds no path.*corpus"),
])
def test_a_bad_record_is_refused_and_nothing_written(tmp_path, changes, says):
    if changes.get("label") == "cpu2" and pathlib.Path.home() == pathlib.Path("/"):
        pytest.skip("the home folder is /, which no path can be told from")
    with pytest.raises(ValueError, match=says):
        write(tmp_path, **changes)
    assert not (tmp_path / "results").exists()


def test_a_committed_record_names_no_folder_of_this_machine(tmp_path):
    root = tmp_path / "checkout"
    for changes in ({"command": f"python {root}/real_model_example.py"}, {"details": {"a": [f"{root}/corpus"]}},
                    {"command": "python real_model_example.py data=/corpus"}, {"settings": {"data": "/corpus"}},
                    {"command": "/opt/bin/python real_model_example.py"}, {"settings": {"data": "C:\\corpus"}}):
        with pytest.raises(ValueError, match="holds no path of a machine; this has .*(corpus|python)"):
            write(root, label="cpu2", **changes)
        write(root, **changes)                                     # what stays under runs/ may
    write(root, label="cpu2", command="python real_model_example.py data=corpus/a lr=1/2",
          details={"sample": f"#!/usr/bin/env python, prefix{root}-other"})


def test_the_command_is_as_a_user_types_it(tmp_path):
    argv = [str(tmp_path / "strategies/compare.py"), "steps=3", f"data={tmp_path}/runs/my text"]
    assert results.shown_command(argv, tmp_path) == "python strategies/compare.py steps=3 'data=runs/my text'"


def test_units_of_keys():
    good = "optimizer_bytes step_seconds_median loss_nats tokens_per_second bubble_fraction bytes".split()
    bad = "loss optimizer_bytes_rank0 kilobytes optimizer step_ms".split()
    assert [key for key in good + bad if results._UNIT.fullmatch(key)] == good


def test_missing_and_broken_records_are_named(tmp_path):
    write(tmp_path, label="cpu2")
    with pytest.raises(FileNotFoundError, match="results/gpu1/strategies.*Kept so far: cpu2/strategies/3_zero"):
        results.read(RUN, "gpu1", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="no record pipedream/simple"):
        results.read("pipedream/simple", root=tmp_path)
    broken = tmp_path / "results/cpu2/broken.json"
    broken.write_text('{"run": ')
    with pytest.raises(ValueError, match="results/cpu2/broken.json is no JSON"):
        results.read("broken", "cpu2", root=tmp_path)
    broken.write_text("[]")
    with pytest.raises(ValueError, match="no record"):
        results.read_all("cpu2", root=tmp_path)


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    path = write(tmp_path, label="cpu2")
    old = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write(tmp_path, label="cpu2", outcome="out of memory")
    assert path.read_text() == old and [p.name for p in path.parent.iterdir()] == [path.name]


def test_commit_and_dirty(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org",
                        *arguments], check=True, capture_output=True)
    git("init")
    (tmp_path / "a.py").write_text("a = 1\n")
    git("add", ".")
    git("-c", "commit.gpgsign=false", "commit", "-m", "a", "--no-verify")
    write(tmp_path, label="cpu2")
    record = results.read(write(tmp_path, label="cpu2"))          # the record before does not make it dirty
    assert len(record["commit"]) == 40 and record["dirty"] is False
    (tmp_path / "a.py").write_text("a = 2\n")
    assert results.read(write(tmp_path, folder=tmp_path / "b"))["dirty"] is True


def test_records_are_json_without_extensions(tmp_path):
    json.loads(write(tmp_path).read_text(), parse_constant=lambda word: pytest.fail(word))
