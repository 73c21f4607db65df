"""The notes of the annotated configs: complete, in their columns, and true of the installed DeepSpeed and of upstream's files."""

import hashlib
import json
import re

import pytest

from tests.annotated_configs import form
from tests.annotated_configs.form import FILES
from tests.yardstick.test_deepspeed_config import Z, ask, asked_for, described, signatures  # noqa: F401  ask is a fixture
from yardstick import deepspeed_annotate, deepspeed_config, deepspeed_explain, deepspeed_map, deepspeed_memory, formulas
from yardstick.deepspeed_source import Package
from yardstick.results import ROOT

# SHA-256 of upstream's three files at commit 45b4b7156c8794a3452a5a7d03dbd8d797068569, as sorted JSON: the first 16 digits
UPSTREAM = {"zero3_nvme_offload_annotated": "939cb43a386aac6a", "zero3_cpu_offload_annotated": "54f090989d66959d",
            "zero2_zenflow_annotated": "def82a2f7b5abe3d"}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_there_are_three():
    assert {path.stem for path in FILES} == set(UPSTREAM)


# Form

@each_file
def test_form(path):
    assert not form.column_errors(path.name, path.read_text(encoding="utf-8"))
    assert not form.part_errors(path)


@pytest.mark.parametrize("old, new, says", [
    ("// Sequences", " // Sequences", "begins in column 52"), ("// Sequences", "// Sequences " + "x" * 60, "columns, more than"),
    ('"train_batch_size": 8,', '"train_batch_size": 8, "x": [1, 2, 3, 4, 5, 6],', "begins in column"),
    ('  "gradient_clipping": 1.0,', '  "a": 1,\n  "gradient_clipping": 1.0,', "a key without a note")])
def test_each_rule_of_columns_finds_a_bad_example(old, new, says):
    text = FILES[-1].read_text(encoding="utf-8")
    assert old in text
    assert any(says in error for error in form.column_errors("x.json", text.replace(old, new, 1)))


@pytest.mark.parametrize("old, part", [
    ("// unit sequences; ", "unit"), ("range >= 1", "range"), ("// cost: time", "cost"), ("// cost: none itself", "cost"), ("// with: ", "with"), ("// read: ds", "read"), ("// upstream: 1;", "upstream")])
def test_each_missing_part_is_found(tmp_path, old, part):
    file, text = tmp_path / "x.json", FILES[-1].read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, "// x" if old.startswith("//") else "x", 1))
    assert any(f"has no {part}" in error for error in form.part_errors(file))


@each_file
def test_the_notes_are_those_of_the_map(path):
    """`annotate --write` has nothing to do: no note has drifted from deepspeed_config.json, or from the linter."""
    assert deepspeed_annotate.annotate(path) == path.read_text(encoding="utf-8")


# Against DeepSpeed

def limits_of(text):
    """{"ge" and so on: bound} of a range in a note."""
    names = {">=": "ge", ">": "gt", "<=": "le", "<": "lt"}
    return {names[sign]: float(bound) for sign, bound in re.findall(r"([<>]=?) ([-\d.e]+)", text)}


@pytest.fixture(scope="module")
def from_deepspeed(ask):  # noqa: F811
    """{dotted key: (default, limits)} of the keys that DeepSpeed's classes, getters and optimizers define."""
    models, (_, seen, _), (optimizers, _) = ask(described), ask(asked_for), ask(signatures)
    sections, found = {spec["read"]: key for key, spec in deepspeed_config.KEYS.items() if spec.get("strict")}, {}
    for name, fields in models.items():
        for key, (default, limits, _, _) in fields.items():
            found[f"{sections[name]}.{key}".lstrip(".")] = default, limits
    for section, values in seen.items():
        for key, value in values.items():
            found.setdefault(f"{section}.{key}".lstrip("."), (value, {}))
    for key, value in optimizers["DeepSpeedCPUAdam"].items():
        found[f"optimizer.params.{key}"] = value, {}
    return found


@each_file
def test_defaults_and_ranges_are_those_of_deepspeeds_classes(path, from_deepspeed):
    held, bounded = 0, 0
    for key, note in form.notes(path).items():
        if "default" not in note or key not in from_deepspeed or key in ("train_batch_size", "gradient_accumulation_steps"):
            continue                                         # the last two: what follows from the one that was given, no default
        default, limits = from_deepspeed[key]
        text = note["default"]
        told = None if text == "none" and default is None else text if isinstance(default, str) else json.loads(text)
        if not isinstance(default, dict):                    # a section
            assert told == default, f"{key}: the note says default {text}, DeepSpeed has {default}"
            held += 1
        if limits:
            assert limits_of(note["range"]) == limits, f"{key}: the note says range {note['range']}, DeepSpeed has {limits}"
            bounded += 1
    assert held > 15 and bounded >= (5 if "zero3" in path.name else 3)


def refused(rows):
    """[whether DeepSpeedConfig refuses the key with this value] for rows of (config, dotted key, value)."""
    from deepspeed.runtime.config import DeepSpeedConfig
    answers = []
    for config, key, value in rows:
        section, *names = json.loads(json.dumps(config)), *key.split(".")
        top = section
        for name in names[:-1]:
            section = section[name]
        section[names[-1]] = value
        try:
            DeepSpeedConfig({**top, "train_batch_size": None, "train_micro_batch_size_per_gpu": 1})
            answers.append(False)
        except Exception:
            answers.append(True)
    return answers


@each_file
def test_deepspeed_takes_what_is_in_a_range_and_refuses_what_is_not(path, ask, from_deepspeed):  # noqa: F811
    """Bounds that its classes have, and words: the least value above or on a bound is taken, the next outside is refused."""
    config, rows, expected = deepspeed_config.read(path), [], []
    for key, note in form.notes(path).items():
        if key.endswith(".stage") or not from_deepspeed.get(key, (0, {}))[1] and not key.endswith((".device", "select_strategy")):
            continue
        spec = deepspeed_config.entry(key, config)
        step = 1 if spec["type"] == "int" else 1e-6
        for name, bound in limits_of(note["range"]).items():
            sign = 1 if name.startswith("g") else -1
            inside, outside = (bound, bound - sign * step) if name.endswith("e") else (bound + sign * step, bound)
            rows += [(config, key, type(step)(inside)), (config, key, type(step)(outside))]
            expected += [False, True]
        words = [] if limits_of(note["range"]) else [word for word in note["range"].split(" | ")]
        rows += [(config, key, word) for word in words if word != "nvme" or "offload_param" in key] + [(config, key, "disk")]
        expected += [False] * (len(rows) - len(expected) - 1) + [True]
        if not words:
            rows.pop()
            expected.pop()
    assert len(rows) > 5
    answers = ask(refused, rows)
    wrong = [(key, value, answer) for (_, key, value), answer, wanted in zip(rows, answers, expected) if answer != wanted]
    assert not wrong


@pytest.fixture(scope="module")
def package():
    try:
        return Package.at()
    except ValueError as error:
        pytest.skip(str(error))


@each_file
def test_the_cited_anchors_read_and_use_the_key(path, package):
    config = deepspeed_config.read(path)
    for key, note in form.notes(path).items():
        read, _, used = note["read"].partition("; used: ")
        anchor = deepspeed_map.ANCHORS[read.removeprefix("ds:")]
        _, file, symbol, name = deepspeed_explain.reader(key, config)
        assert anchor["file"] == file and anchor["symbol"] in (symbol, f"{symbol}.__init__"), key
        line = deepspeed_explain.line_of(package, file, anchor["symbol"], name)
        if line is None:                                     # a section: the class itself
            assert isinstance(deepspeed_explain.value_of(config, key), dict) and symbol.endswith("Config"), key
        else:
            source = package.text(file).splitlines()[line - 1]
            assert name in source or name.upper() in source, f"{key}: {file}:{line} does not name it: {source.strip()}"
        told = [one for one in used.split(", ") if one]
        expressions = deepspeed_config.entry(key, config).get("used", {})
        for one in told:
            anchor = deepspeed_map.ANCHORS[one.removeprefix("ds:")]
            assert package.landmarks(anchor["file"], anchor["symbol"], expressions[one]), f"{key}: {one} has no {expressions[one]}"


def test_each_use_in_the_map_is_in_deepspeed(package):
    for key, spec in deepspeed_config.KEYS.items():
        for one, expression in spec.get("used", {}).items():
            anchor = deepspeed_map.ANCHORS[one.removeprefix("ds:")]
            assert package.landmarks(anchor["file"], anchor["symbol"], expression), f"{key}: {one} has no {expression}"


# Against upstream

@each_file
def test_upstreams_values_are_upstreams(path):
    told = json.dumps(form.upstream(path), sort_keys=True)
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == UPSTREAM[path.stem], told
    text = path.read_text(encoding="utf-8")
    assert "45b4b7156c8794a3452a5a7d03dbd8d797068569" in text and text.count("DeepSpeedExamples") == 1


@each_file
def test_what_deepspeed_ignores_of_upstreams_is_marked(path):
    """Marked are at least the keys of upstream's at which the linter finds that they have no effect."""
    found = deepspeed_config.lint(form.upstream(path), ranks=1)
    idle = {finding.key for finding in found if re.search(r"\"auto\"|no effect|does nothing|replaces it", finding.message)}
    marked = {key for key, note in form.notes(path).items() if "; ignored: " in note["upstream"]}
    assert idle <= marked and marked


# Against the linter, and the ledger

@each_file
def test_the_linter_passes_them(path):
    for ranks in (1, 2, 4, 8):
        found = deepspeed_config.lint(deepspeed_config.read(path), ranks=ranks, accelerator="cpu")
        assert [finding.key for finding in found] == ([Z + "zenflow"] if "zenflow" in path.name else [])
        assert all(finding.level == "warning" for finding in found)


def test_the_defect_of_zenflow_is_told():
    note = form.notes(ROOT / "annotated_configs/zero2_zenflow_annotated.json")[Z + "zenflow"]
    assert "transposed" in note["warning"] and "annotated_scripts/04_zenflow_zero2_annotated.py" in note["here"]


NVME, CPU = Z + "offload_optimizer.", Z + "offload_param."
COSTS = [                                # (file, key, which formula of its cost, names of the ledger's items)
    ("zero3_nvme_offload", CPU + "buffer_size", 0, ["swap buffers of the weights"]),
    ("zero3_nvme_offload", CPU + "nvme_path", 0, ["weights of the own share in files"]),
    ("zero3_nvme_offload", NVME + "nvme_path", 0, ["fp32 master weights in files", "Adam's two moments in files"]),
    ("zero3_nvme_offload", NVME + "nvme_path", 1, ["fp32 gradients in files"]),
    ("zero3_nvme_offload", NVME + "buffer_count", 0, ["swap buffers of the optimizer"]),
    ("zero3_nvme_offload", Z + "reduce_bucket_size", 0, ["bucket of gradients to reduce"]),
    ("zero3_cpu_offload", CPU + "device", 0, ["weights of the own share"]),
    ("zero3_cpu_offload", NVME + "device", 0, ["fp32 master weights", "Adam's two moments"]),
    ("zero3_cpu_offload", NVME + "device", 1, ["fp32 gradients of the own share"]),
    ("zero3_cpu_offload", "optimizer.type", 0, ["Adam's two moments"]),
    ("zero3_cpu_offload", "bf16.enabled", 0, ["fp32 master weights"]),
    ("zero2_zenflow", "gradient_accumulation_steps", 0, ["gradients accumulated over micro-steps"]),
    ("zero2_zenflow", NVME + "device", 0, ["fp32 master weights", "Adam's two moments"]),
]


@pytest.mark.parametrize("name, key, number, items", COSTS, ids=lambda value: str(value)[-40:])
def test_costs_are_those_of_the_ledger(name, key, number, items):
    """Each formula, computed for a model whose shares need no padding, is what deepspeed_memory predicts, and that is counted
    in live engines by other tests."""
    config = deepspeed_config.read(ROOT / f"annotated_configs/{name}_annotated.json")
    tensors, ranks = deepspeed_memory.Tensors((2**21,) * 8), 2
    config.setdefault("zero_optimization", {}).pop("zenflow", None)
    if "sub_group_size" in config["zero_optimization"] and name == "zero3_nvme_offload":
        config["zero_optimization"]["sub_group_size"] = 2**20               # so that a tile is just as large
    cost = deepspeed_explain.facts(key, config, {"P": tensors.count, "N": ranks})[2]
    told = re.findall(r"bytes = ([\d.,]+ \w+)", cost)[number]
    held = sum(item.nbytes for item in deepspeed_memory.memory(tensors, config, ranks=ranks, accumulation=4) if item.name in items)
    assert held and told == deepspeed_explain.size(held)


def test_the_costs_of_stages_are_the_papers():
    cost = deepspeed_explain.facts(Z + "stage", {"zero_optimization": {"stage": 3}}, {"P": 7.5e9, "N": 64})[2]
    told = re.findall(r"bytes = ([\d.,]+ \w+)", cost)
    assert told == [deepspeed_explain.size(formulas.zero_state_bytes(params=7.5e9, ranks=64, stage=stage)) for stage in range(4)]
