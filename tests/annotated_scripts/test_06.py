"""06: Domino's layers are torch's, its sums hide as drawn, and both modes train as one process does; what is refused."""

import json
import os
import subprocess
import sys

import pytest
from matplotlib.image import imread

from yardstick import results

SCRIPT = "annotated_scripts/06_domino_megatron_annotated.py"
TINY = ["layers=2", "hidden=64", "seq=16", "micro_batch=4", "accumulation=2", "steps=3"]
LAYERS = 2                                     # that are recorded


def ran(*settings, ranks=2, replace=()):
    """(exit code, stdout, stderr) of the script on CPU ranks. replace: [(what, by what)] in its text, before it runs."""
    start = [SCRIPT]
    if replace:
        text = (results.ROOT / SCRIPT).read_text(encoding="utf-8")
        for what, by in replace:
            assert what in text
            text = text.replace(what, by)
        start = ["-c", f"import sys; sys.argv[0] = {SCRIPT!r}; exec(compile({text!r}, {SCRIPT!r}, 'exec'), "
                       f"{{'__name__': '__main__', '__file__': {SCRIPT!r}}})"]
    done = subprocess.run([sys.executable, *start, *settings], cwd=results.ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "DS_ACCELERATOR": "cpu", "RANKS": str(ranks)})
    return done.returncode, done.stdout, done.stderr


def recorded(folder, *settings, **options):
    code, said, errors = ran(*settings, f"output={folder}", **options)
    assert code == 0, errors
    return json.loads((folder / "record.json").read_text())["measured"], said


@pytest.fixture
def domino(proved):
    """{"inter": record, "intra": record}"""
    _, (inter, intra, *_) = proved("06")
    assert [record["settings"]["variant"] for record in (inter, intra)] == ["inter", "intra"]
    return {"inter": inter, "intra": intra}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", ["inter", "intra"])
def test_split_layers_are_whole_layers(domino, variant):
    """Of torch, with the gathered weights: output, gradient of the input, gradient of each weight."""
    measured = domino[variant]["measured"]
    for name in "output_gap_ratio", "input_gradient_gap_ratio", "weight_gradient_gap_ratio_max":
        assert measured[name] < 5e-6
    for name, value in domino[variant]["predicted"].items():
        assert measured[name] == value


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sums_hide_behind_the_other_half(domino):
    """All but the last of the layers, in both directions. Within a layer: not its last sum, and in backward only the first."""
    sums = 4 * LAYERS                          # of one direction
    hidden = {variant: [record["measured"][f"{phase}_hidden_count"] for phase in ("forward", "backward")]
              for variant, record in domino.items()}
    assert hidden == {"inter": [sums - 1, sums - 1], "intra": [sums - LAYERS, LAYERS]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_run_trains_as_one_process_does(proved):
    _, records = proved("06")
    assert [(record["settings"]["mode"], record["settings"]["zero"]) for record in records] == [
        ("domino", 1), ("domino", 0), ("pipeline", 1), ("pipeline", 0), ("pipeline", 0)]
    for record in records:
        assert record["measured"]["loss_gap_nats_max"] < 1e-5
        assert record["measured"]["loss_nats_last"] < record["measured"]["loss_nats_first"] - 0.1
        if record["settings"]["optimizer"] == "SGD":
            assert record["measured"]["weight_gap_ratio_max"] < 5e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pipeline_trains_as_data_parallelism_does(proved):
    """With half as many micro-batches on each of the two ranks."""
    _, (*_, stages, replicas) = proved("06")
    assert (stages["settings"]["model_parallel"], replicas["settings"]["model_parallel"]) == (2, 1)
    assert stages["details"]["losses"] == pytest.approx(replicas["details"]["losses"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_timeline_is_drawn_and_printed(tmp_path):
    measured, said = recorded(tmp_path / "run", *TINY, "steps=1", "reference=False")
    assert "loss_gap_nats_max" not in measured
    assert imread(tmp_path / "run" / "timeline.png").shape[1] > 2000
    rows = [line.partition(" |")[0].rstrip() for line in said.splitlines() if line.endswith("|")]
    assert rows == [f"half {half} {what}" for half in (0, 1) for what in ("computes", "sends")] * 2
    for half, after in (0, "dense"), (1, "dense"), (0, "fc2"), (1, "fc2"), (0, "fc1"), (1, "qkv"):
        assert f"half {half}     {after}" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode, replace", [
    ("domino", [("p.tensor_model_parallel", "p.cut"), ('"tensor_model_parallel"', '"cut"')]),
    ("pipeline", [("p.model_parallel =", "p.cut =")])])
def test_without_the_mark_a_gradient_is_clipped_wrongly(tmp_path, mode, replace):
    """The script gathers by another name, which DeepSpeed does not look for."""
    good, bad = (recorded(tmp_path / name, *TINY, f"mode={mode}", "optimizer=SGD", "learning_rate=0.3", replace=each)[0]
                 for name, each in (("marked", ()), ("unmarked", replace)))
    assert good["loss_gap_nats_max"] < 1e-5 < 1e-4 < bad["loss_gap_nats_max"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_layers_of_ranks_and_two_replicas_of_two_stages(tmp_path):
    for mode in "domino", "pipeline":
        measured, _ = recorded(tmp_path / mode, *TINY, f"mode={mode}", "zero=1", "optimizer=SGD", "learning_rate=0.3", ranks=4)
        assert measured["loss_gap_nats_max"] < 1e-5 and measured["weight_gap_ratio_max"] < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("settings, ranks, says", [
    ("variant=outer", 2, "variant=outer is none of inter, intra"), ("stages=2", 2, "unknown setting stages=2"),
    ("zero=2", 2, "zero=2: give 0, 1"), ("", 3, "model_parallel=2 does not divide 3 ranks"),
    ("", 1, "model_parallel=2 does not divide 1 ranks"), ("model_parallel=0", 2, "model_parallel=0 does not divide 2 ranks"),
    ("heads=3", 2, "heads=3 does not divide hidden=128"), ("heads=1", 2, "model_parallel=2 does not divide heads=1"),
    ("micro_batch=3", 2, "micro_batch=3 cannot be halved"), ("steps=0", 2, "steps=0: give 1 or more"),
    ("learning_rate=nan", 2, "learning_rate=nan"),
    ("seq=99999999", 2, "micro_batch * heads * seq * seq is 319,999,993,600,000,032, above 100,000,000"),
    ("hidden=99999996", 2, "layers * hidden * hidden is"), ("accumulation=9999999", 2, "micro_batch * accumulation * seq is"),
    ("micro_batch=99998 seq=1", 2, "micro_batch * seq is"),
    ("seed=4294967296", 2, "is not below 2**32"),
    ("mode=pipeline layers=1 model_parallel=4", 4, "give at most 3 stages for layers=1")])
def test_bad_input_gives_one_message(settings, ranks, says):
    code, _, errors = ran(*settings.split(), ranks=ranks)
    assert code and says in errors and "Traceback" not in errors and len(errors.strip().splitlines()) == 1
