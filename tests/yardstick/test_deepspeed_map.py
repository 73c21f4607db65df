"""The anchors hold in the installed DeepSpeed, an altered copy of it is found out, and everything is cited."""

import contextlib
import io
import json
import re
import resource
import shutil
import subprocess
import sys

import pytest

from strategies import call_order
from yardstick import deepspeed_citations, deepspeed_map, results
from yardstick.deepspeed_source import Package, form
from yardstick.results import ROOT

LAST_LINE = re.compile(r"\d+ anchors verified, \d+ not")


@pytest.fixture(scope="module")
def package():
    try:
        return Package.at()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def copy(package, tmp_path_factory):
    """A copy of the package's Python files in a folder of its own, to be altered."""
    folder = tmp_path_factory.mktemp("release") / "deepspeed"
    shutil.copytree(package.folder, folder, ignore=lambda folder, names: [
        name for name in names if "." in name and not name.endswith(".py")] + ["__pycache__", "ops/csrc"])
    return folder


@pytest.fixture
def altered(copy):
    """altered(file, old, new): change a file of the copy; it is put back after the test."""
    before = {}

    def change(file, old, new):
        path = copy / file
        text = path.read_text()
        before.setdefault(path, text)
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return copy
    yield change
    for path, text in before.items():
        path.write_text(text)


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "yardstick.deepspeed_map", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True)


def said(*arguments):
    """What a command prints, called in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = deepspeed_map.main([str(argument) for argument in arguments])
    return code, out.getvalue()


# The map

def test_the_map_is_large_enough_and_each_anchor_is_complete(package):
    assert len(deepspeed_map.ANCHORS) >= 200
    places = [(anchor["file"], anchor["symbol"]) for anchor in deepspeed_map.ANCHORS.values()]
    assert len(set(places)) == len(places)
    for name, anchor in deepspeed_map.ANCHORS.items():
        assert re.fullmatch(r"[a-z0-9]+\.[a-z0-9_]+", name)
        assert set(anchor) - {"former", "read"} == {"file", "symbol", "landmark", "code", "says"}, name
        assert re.fullmatch(r"[A-Z].{25,320}\.", anchor["says"]), name
        assert package.landmarks(anchor["file"], anchor["symbol"], anchor["landmark"]), f"{name}: no {anchor['landmark']}"
        assert anchor.get("read", next(iter(deepspeed_map.REASONS))) in deepspeed_map.REASONS, name
    assert len({anchor["says"] for anchor in deepspeed_map.ANCHORS.values()}) == len(places), "two anchors have the same note"
    assert {anchor["read"] for anchor in deepspeed_map.ANCHORS.values() if "read" in anchor} == set(deepspeed_map.REASONS)


def test_check_verifies_the_installed_release_within_five_seconds(package):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("check")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"{len(deepspeed_map.ANCHORS)} anchors verified, 0 not"
    assert not any(LAST_LINE.search(line) for line in lines[:-1])
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime     # its own: others use this machine too
    assert seconds < 5


def test_deepspeed_is_not_imported(package):
    code = ("import sys\nfrom yardstick import deepspeed_map\nassert deepspeed_map.main(['check']) == 0\n"
            "assert not {'deepspeed', 'torch', 'numpy'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# An altered copy is found out

def test_an_altered_copy_is_found_out_by_name(altered):
    zero12 = "runtime/zero/stage_1_and_2.py"
    altered(zero12, "            param.grad_accum = None\n        else:", "            param.grad_accum = 0\n        else:")
    altered(zero12, "def has_overflow(self,", "def has_any_overflow(self,")
    altered("runtime/zero/partition_parameters.py", "def free_param(", "def lost(")
    folder = altered("runtime/zero/partition_parameters.py", "torch.empty(0, dtype=param.dtype, device=param.device)", "None")
    done = run("check", "--package", folder)
    assert done.returncode == 1, done.stderr
    states = {name: state for state, name in re.findall(r"^(\w+): ([\w.]+): ", done.stdout, re.MULTILINE)}
    # the class of stages 1 and 2 is an anchor too: it changed with its methods
    assert states == {"zero12.drop": "changed", "zero12.overflow": "moved", "zero3.free": "gone", "zero12.class": "changed"}
    assert done.stdout.splitlines()[-1] == f"{len(deepspeed_map.ANCHORS) - 4} anchors verified, 4 not"


@pytest.mark.parametrize("old, new, state, says", [
    ("def free_param(", "# a comment\n\n\n\ndef free_param(", "verified", ""),
    ('    """Free underlying storage of a parameter."""', '    """Something else."""  # and a remark', "verified", ""),
    ("param.data = torch.empty(0, dtype=param.dtype, device=param.device)",
     "param.data = torch.empty(\n        0,\n        dtype=param.dtype, device=param.device)", "verified", ""),
    ("param.data = torch.empty(0, dtype=param.dtype", "param.data = torch.empty(1, dtype=param.dtype", "changed", "no longer inside"),
    ("    param.ds_status = ZeroParamStatus.NOT_AVAILABLE\n", "", "changed", "still inside"),
    ("    if get_accelerator().on_accelerator(param.data):\n        # need", "    if True:\n        # need", "changed", "still inside"),
    ("def free_param(", "def release_param(", "moved", "release_param, with the same code"),
    ("def free_param(", "class Other:\n  def free_param(", "moved", "Other.free_param"),
])
def test_states(altered, old, new, state, says):
    file = deepspeed_map.ANCHORS["zero3.free"]["file"]
    if new.startswith("class Other"):
        new, old = new + "param): return 1 \n  def x(", old
    found = deepspeed_map.look("zero3.free", Package(altered(file, old, new)))
    assert (found.state, says in found.detail) == (state, True), found


def test_moved_to_another_file_and_gone(altered, copy):
    file = "utils/torch.py"
    code = (copy / file).read_text()
    start = code.index("def register_grad_hook(")
    altered(file, code[start:], "")
    assert deepspeed_map.look("engine.grad_hook", Package(copy)).state == "gone"
    altered("utils/nvtx.py", (copy / "utils/nvtx.py").read_text()[-20:], (copy / "utils/nvtx.py").read_text()[-20:] + "\n\n" + code[start:])
    found = deepspeed_map.look("engine.grad_hook", Package(copy))
    assert (found.state, found.file) == ("moved", "utils/nvtx.py")


def test_a_name_that_many_have_is_not_taken_for_a_move(altered):
    folder = altered("comm/torch.py", "    def all_reduce(self, tensor", "    def all_reduced(self, tensors, tensor")
    assert deepspeed_map.look("comm.all_reduce", Package(folder)).state == "gone"


def test_form_is_the_code_and_nothing_else():
    import ast
    shape = lambda text: form(ast.parse(text))
    same = shape("def f(a):\n  '''x'''\n  if a: return [a,\n   1]  # y")
    assert same == shape("def f( a ):\n    if a:\n        'z'\n        return [a, 1]")
    assert same != shape("def f(a):\n  if a: pass\n  return [a, 1]")
    assert same != shape("def f(a):\n  if a: return [a, 2]")


# Commands

def test_show_gives_the_lines_of_this_installation_and_what_cites_it(package):
    code, text = said("show", "ds:zero3.free")
    first, last = package.lines("runtime/zero/partition_parameters.py", "free_param")
    assert code == 0 and deepspeed_map.ANCHORS["zero3.free"]["says"][:60] in text
    assert f"lines {first} to {last}" in text and f"partition_parameters.py:{first}\n" in text
    source = package.text("runtime/zero/partition_parameters.py").splitlines()
    assert all(f"{number:>6}" in text and source[number - 1] in text for number in range(first, last + 1))
    cited = re.search(r"cited by (.+)", text)[1]
    assert "annotated_scripts/README.md:" in cited
    code, text = said("show", "zero12.step")
    assert re.search(r"cited by .*strategies/3_zero_stage2/README\.md:\d+", text) and "      ..." in text


def test_show_lists_groups_and_config_keys_cite_their_reader(package):
    _, text = said("show", "moe")
    assert text.count("\n| `ds:moe.") == sum(name.startswith("moe.") for name in deepspeed_map.ANCHORS)
    _, text = said("show", "config.zero")
    assert "yardstick/deepspeed_config.json:" in text


def test_where_of_a_card_a_traceback_and_what_cites_nothing(package):
    card = "strategies/3_zero_stage2/README.md"
    lines = (ROOT / card).read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if line.startswith("- `ds:zero12.flush`"))
    code, text = said("where", f"{ROOT / card}:{number}")
    first, last = package.lines("runtime/zero/stage_1_and_2.py", "DeepSpeedZeroOptimizer.reduce_ipg_grads")
    assert code == 0 and f"ds:zero12.flush  runtime/zero/stage_1_and_2.py:{first}-{last}" in text
    assert "around it:\n" in text and "ds:zero12.step" in text
    for place in (f"runtime/zero/stage_1_and_2.py:{first + 3}", f"{package.folder}/runtime/zero/stage_1_and_2.py:{last}"):
        code, text = said("where", place)
        assert code == 0 and "ds:zero12.flush" in text
    assert "cites an anchor" in said("where", f"{ROOT / 'LICENSE'}:3")[1]


@pytest.mark.parametrize("arguments, says", [
    (["show", "zero3.stepp"], "Did you mean zero3.step?"), (["where", "README.md"], "no FILE:LINE"),
    (["where", "none.py:3"], "no file none.py"), (["where", "LICENSE:100000"], "there is no line 100000"),
    (["check", "--package", "tests"], "holds no DeepSpeed"), (["drift", "tests"], "holds no DeepSpeed"),
    (["drift", "tests", "--record", "a/b"], "no folder name"), (["accept", "zero3.none"], "no anchor"),
])
def test_bad_input_is_one_message(arguments, says):
    done = run(*arguments)
    assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert run("chek").returncode == 2


def test_drift_reports_a_release(altered, package):
    folder = altered("runtime/zero/partition_parameters.py", "def free_param(", "\n\ndef release_param(")
    code, text = said("drift", folder)
    assert code == 0 and "moved: zero3.free: " in text
    assert f": {len(deepspeed_map.ANCHORS) - 1} verified, 1 moved, 0 changed, 0 gone; " in text


def test_accept_takes_the_installed_code(package, tmp_path, monkeypatch):
    text = deepspeed_map.FILE.read_text()
    monkeypatch.setattr(deepspeed_map, "FILE", tmp_path / "map.json")
    deepspeed_map.FILE.write_text(text.replace(deepspeed_map.ANCHORS["zero3.free"]["code"], "0" * 16))
    said("accept", "zero3.free")
    assert deepspeed_map.FILE.read_text() == text


# Citations

def test_every_citation_names_an_anchor():
    unknown = [f"{path}:{line}: ds:{name}" for path, line, name in deepspeed_citations.citations(deepspeed_map.places())
               if name not in deepspeed_map.ANCHORS]
    assert not unknown, "\n".join(unknown)


def test_every_anchor_is_cited():
    cited = {name for _, _, name in deepspeed_citations.citations(deepspeed_map.places())}
    assert not set(deepspeed_map.ANCHORS) - cited


@pytest.mark.parametrize("text, names", [
    ("the update (`ds:zero3.step`), then ds:zero3.norms.", ["zero3.step", "zero3.norms"]),
    ("loss.backward()   #| ds:engine.backward: divides", ["engine.backward"]),
    ('"stage": 3,  // ds:config.zero', ["config.zero"]), ("ds:zero3.step.more", ["zero3.step.more"]),
    ("records:zero3.step, f'{ds:.2f}', ds: int, {'ds': 1}", []),
])
def test_citations_are_read(text, names):
    assert [name for _, name in deepspeed_citations.cited_names("\n" + text)] == names


@pytest.mark.parametrize("path, text, line, here, around", [
    ("a.py", "x = 1  # ds:a.a\ndef f():\n    y = 2  # ds:b.b\n    z = 3\n\nw = 4  # ds:c.c\n", 4, [], ["b.b"]),
    ("a.py", "x = 1  # ds:a.a\n", 1, ["a.a"], []),
    ("a.md", "# A\nds:a.a\n## B\ntext\n\nds:b.b\n", 4, [], ["b.b"]),
    ("a.json", '{\n  "a": {  // ds:a.a\n    "b": 1\n  },\n  "c": 2  // ds:c.c\n}\n', 2, ["a.a"], ["c.c"]),
    ("a.md", "# A\ntext\n", 2, [], []),
])
def test_what_stands_around_a_line(path, text, line, here, around):
    assert deepspeed_citations.enclosing_citations(path, text, line) == (here, around)


# Records

def test_anchors_are_traced_or_say_why_not():
    """Each record is of the six strategies; what one of them enters needs no excuse, what none enters needs one."""
    traced = set()
    for strategy in call_order.FOLDERS:
        entered = results.read(f"deepspeed_map/calls_{strategy}", "cpu2")["details"]["entered"]
        traced |= {name for phase in entered.values() for name in call_order.anchors_of(phase).values()}
    excused = {name for name, anchor in deepspeed_map.ANCHORS.items() if "read" in anchor}
    assert not traced & excused
    assert traced | excused == set(deepspeed_map.ANCHORS)


def test_drift_is_recorded_for_three_releases():
    found = [one for one in results.read_all("cpu2", "deepspeed_map") if "/drift_" in one["run"]]
    assert len({one["settings"]["release"] for one in found}) >= 3
    for one in found:
        measured = one["measured"]
        assert sum(measured[f"{state}_count"] for state in deepspeed_map.STATES) == measured["anchors_count"]
        assert all(len(one["details"][state]) == measured[f"{state}_count"] for state in ("moved", "changed", "gone"))


def test_the_map_is_one_anchor_on_a_line():
    lines = deepspeed_map.FILE.read_text().splitlines()
    assert sum(json.loads("{" + line.strip().rstrip(",") + "}").keys() <= set(deepspeed_map.ANCHORS)
               for line in lines if line.startswith('    "') and '"symbol"' in line) == len(deepspeed_map.ANCHORS)
