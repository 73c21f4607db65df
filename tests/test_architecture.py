"""Which file may import which, first lines, lengths and names of files, and what no file may hold.

Each rule is a function of a path and a text that returns what is wrong; it is run over the repository's files,
and on a bad example, so that a rule which finds nothing is known to be able to find something.
"""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from yardstick.documents import files
from yardstick.results import ROOT, path_pattern

# The parts of yardstick, by what they may import. A new module is named here before it passes.
PARTS = {
    "core": "settings shapes formulas step_time schedules hardware plan plan_job plan_text results documents deepspeed_map "
            "deepspeed_source deepspeed_citations deepspeed_proof deepspeed_explain deepspeed_annotate call_trace "
            "launchers deepspeed_config deepspeed_rules deepspeed_memory deepspeed_peak deepspeed_traffic".split(),
    "arrays": "data data_sources images figures figures_pipeline timeline".split(),
    "torch": "ranks matmul model ledger probe traffic op_cache report report_text progress watchdog program".split()}
YARDSTICK = "yardstick/core yardstick/arrays yardstick/torch hjson "
OPTIONAL = "tqdm tensorboard datasets wandb psutil"

# (files, what they may import anywhere, what they may import inside functions only). The standard library is
# free; "own" is the file's own top-level folder; a folder that is not named as "own" imports no sibling.
TABLE = [
    (r"env_setup\.py", "", ""),                                    # it runs before anything is installed
    (r"yardstick/__init__\.py", "", ""),
    (rf"yardstick/({'|'.join(PARTS['core'])})\.py", "hjson yardstick/core", ""),
    (r"yardstick/data\.py", "hjson yardstick/core yardstick/arrays numpy tokenizers",
     "transformers tqdm"),                                         # a tokenizer that the user names
    (rf"yardstick/({'|'.join(PARTS['arrays'])})\.py",
     "hjson yardstick/core yardstick/arrays numpy matplotlib tokenizers", "tqdm datasets"),
    (r"yardstick/model\.py", YARDSTICK + "numpy torch", "tqdm"),
    (rf"yardstick/({'|'.join(PARTS['torch'])})\.py", YARDSTICK + "numpy torch", "deepspeed tqdm"),
    (r"real_model_example\.py|strategies/.*",
     YARDSTICK + "own torch deepspeed transformers safetensors", OPTIONAL),
    (r"(annotated_scripts|annotated_configs|guides)/.*",
     YARDSTICK + "torch numpy deepspeed transformers", OPTIONAL),
    (r"pretrain/.*", YARDSTICK + "own torch numpy transformers safetensors yaml", OPTIONAL),
    (r"(pipedream|megatron)/.*", YARDSTICK + "own torch numpy", OPTIONAL),
    (r"alpa/.*", "yardstick/core yardstick/arrays own numpy jax flax optax scipy", OPTIONAL),
]
PROGRAM = {"real_model_example", "strategies"}                     # one subject: the program and its six configs
FREE = re.compile(r"tests/.*|(.*/)?(test_[^/]*|conftest)\.py")    # tests may import everything

LINES = 300                                  # of a file that is read; its docstring may say why it has more
BYTES = 2_000_000                            # of a file in git
TEXT = re.compile(r".*\.(py|md|sh|json|toml|txt|cff|yaml|yml|cfg|ps1)|(.*/)?[^./]+|\.ci/.*")


# The rules

def imports(tree):
    """[(module, line, inside a function)] of all imports; `from a import b` gives "a.b"."""
    found = []

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = "." * child.level + (child.module or "")
                found.extend((f"{module}.{alias.name}", child.lineno, inside) for alias in child.names)
            elif (isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant)
                  and isinstance(child.args[0].value, str)
                  and ast.unparse(child.func) in ("importlib.import_module", "import_module", "__import__")):
                found.append((child.args[0].value, child.lineno, inside))
            walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
    walk(tree, False)
    return found


def import_errors(path, text, paths=()):
    """What `path` imports against TABLE. `paths`: the repository's files, to tell a sibling from a package."""
    if FREE.fullmatch(path):
        return []
    row = next((row for row in TABLE if re.fullmatch(row[0], path)), None)
    if row is None:
        return [f"{path}: no row of TABLE in tests/test_architecture.py says what it may import; add it there"]
    anywhere, in_functions = set(row[1].split()), set(row[2].split())
    folder = path.rpartition("/")[0]
    own = {path.split("/")[0].removesuffix(".py")}
    own |= PROGRAM if own & PROGRAM else set()
    siblings = {pathlib.PurePath(other).stem for other in paths
                if folder and other.endswith(".py") and other.rpartition("/")[0] == folder}
    errors = []
    for module, line, inside in imports(ast.parse(text)):
        top = module.split(".")[0]
        if top in sys.stdlib_module_names and top not in siblings:
            continue
        name = top
        if top == "yardstick":
            part = module.split(".")[1] if "." in module else ""
            name = next((f"yardstick/{key}" for key, modules in PARTS.items() if part in modules), module)
        elif top in own or top in siblings or top == "":          # "" is a relative import
            name = "own"
        if name not in anywhere and not (inside and name in in_functions):
            where = " outside of functions" if name in in_functions else ""
            errors.append(f"{path}:{line}: imports {module}{where}. It may import the standard library, "
                          f"{row[1] or 'nothing else'}" + (f"; inside functions {row[2]}" if row[2] else ""))
    return errors


def docstring_errors(path, text):
    """The first line of a file says what it is: it is the file's line in the tree of README.md."""
    if path.endswith(".py"):
        first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
        if not first.endswith("."):
            return [f"{path}:1: its docstring does not begin with one line that is a sentence, but {first!r}"]
    if path.endswith((".sh", ".ci/run")) and not re.match(r"(#!.*\n)?# \S", text):
        return [f"{path}:1: its first line (after #!) is no comment that says what it is"]
    return []


def length_errors(path, text):
    if not path.endswith(".py") or FREE.fullmatch(path) or len(text.splitlines()) <= LINES:
        return []
    if f"{LINES} lines" in (ast.get_docstring(ast.parse(text)) or ""):
        return []
    return [f"{path}: {len(text.splitlines())} lines. Split it by idea, or say in its docstring why it has more "
            f"than {LINES} lines"]


def name_errors(path, _):
    names = [part.lower().rpartition(".")[0] or part.lower() for part in path.split("/")]
    return [f"{path}: name the subject; {name} collects what has none" for name in names
            if name in ("utils", "util", "common", "helpers", "misc")]


def content_errors(path, text):
    """Paths of one machine; emoji and characters that cannot be seen."""
    places = [r"/home/\w", r"/Users/\w", r"/(?:root)/\w", r"[A-Z]:\\Users", r"file:///\w"]
    if len(ROOT.parts) > 2:      # /app could be a part of any path
        places.append(path_pattern(ROOT))
    errors = []
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.search("|".join(places), line):
            errors.append(f"{path}:{number}: {found[0]} is a path of one machine; write a relative one")
        if found := re.search("[\U0001F000-\U0001FAFF\u2600-\u27BF\uFE0F\u2B50-\u2B55]", line):
            errors.append(f"{path}:{number}: {found[0]!r} is an emoji")
        if found := re.search("[\u200B-\u200F\u202A-\u202E\u2060\uFEFF\u00A0\x00-\x08\x0B-\x1F]", line):
            errors.append(f"{path}:{number}: {found[0]!r} cannot be seen; write it as an escape or remove it")
    return errors


RULES = [docstring_errors, length_errors, name_errors, content_errors]


# The repository

@pytest.fixture(scope="module")
def texts():
    """{path: text} of the repository's text files."""
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in files() if TEXT.fullmatch(path)}


def none(errors):
    errors = "\n".join(errors)
    assert not errors, "\n" + errors


def test_imports(texts):
    python = {path: text for path, text in texts.items() if path.endswith(".py")}
    assert "yardstick/results.py" in python
    none(error for path, text in python.items() for error in import_errors(path, text, python))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(texts, rule):
    none(error for path, text in texts.items() for error in rule(path, text))


def test_no_large_files():
    none(f"{path}: {size} bytes; git keeps every version for ever" for path in files()
         if (size := (ROOT / path).stat().st_size) > BYTES)


def test_the_core_of_yardstick_works_without_packages():
    """What reading imports cannot see: the modules are really imported, with the packages out of reach."""
    modules = [f"yardstick.{name}" for name in PARTS["core"] if (ROOT / "yardstick" / f"{name}.py").exists()]
    code = ("import sys, importlib\n"
            "for name in ('torch', 'deepspeed', 'numpy', 'matplotlib', 'transformers', 'tokenizers', 'hjson'):\n"
            "    sys.modules[name] = None\n"
            f"for name in {modules!r}: importlib.import_module(name)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Each rule can fail

@pytest.mark.parametrize("path, line, good", [
    ("yardstick/formulas.py", "import math, yardstick.shapes", True),
    ("yardstick/formulas.py", "from yardstick import shapes", True),
    ("yardstick/formulas.py", "import numpy", False),
    ("yardstick/formulas.py", "def f():\n    import torch", False),
    ("yardstick/formulas.py", "import importlib\ndef f():\n    importlib.import_module('torch')", False),
    ("yardstick/formulas.py", "from yardstick import figures", False),
    ("yardstick/formulas.py", "def f():\n    import tqdm", False),
    ("yardstick/figures.py", "import numpy, matplotlib.pyplot", True),
    ("yardstick/figures.py", "from yardstick.ledger import Ledger", False),
    ("yardstick/data_sources.py", "def f():\n    import datasets", True),
    ("yardstick/data_sources.py", "import datasets", False),
    ("yardstick/ledger.py", "import torch\ndef f():\n    import deepspeed.comm", True),
    ("yardstick/ledger.py", "import deepspeed", False),
    ("yardstick/ledger.py", "if True:\n    import deepspeed", False),
    ("yardstick/ledger.py", "class A:\n    import deepspeed", False),
    ("yardstick/model.py", "def f():\n    import deepspeed", False),
    ("yardstick/ledger.py", "from strategies import compare", False),
    ("yardstick/unheard_of.py", "import math", False),
    ("program.py", "import math", False),
    ("env_setup.py", "import tomllib", True),
    ("env_setup.py", "def f():\n    import yardstick", False),
    ("real_model_example.py", "import torch, deepspeed, yardstick.ledger", True),
    ("strategies/compare.py", "from real_model_example import CONFIG\nfrom strategies import benchmark", True),
    ("real_model_example.py", "from strategies import effective", True),
    ("strategies/compare.py", "import pipedream.simulator", False),
    ("guides/zero_from_collectives.py", "import torch, deepspeed, yardstick.ranks", True),
    ("guides/zero_from_collectives.py", "import preflight", False),
    ("guides/zero_from_collectives.py", "from . import preflight", False),
    ("annotated_scripts/01_hello_deepspeed_annotated.py", "import megatron", False),
    ("pretrain/checkpoint.py", "import yaml\nfrom pretrain import moe_layers\nimport minimal_model", True),
    ("pretrain/checkpoint.py", "def f():\n    import wandb", True),
    ("pretrain/checkpoint.py", "import wandb", False),
    ("pretrain/checkpoint.py", "import deepspeed", False),
    ("pretrain/test_moe.py", "import pytest, deepspeed", True),
    ("pipedream/simulator.py", "import pipedream.partitioner, torch", True),
    ("pipedream/simulator.py", "import megatron", False),
    ("alpa/solve.py", "import jax, scipy.optimize, yardstick.formulas", True),
    ("alpa/solve.py", "import torch", False),
    ("alpa/solve.py", "import yardstick.ranks", False),
    ("tests/test_x.py", "import torch, jax", True),
])
def test_imports_are_judged(path, line, good):
    paths = ["guides/preflight.py", "pretrain/minimal_model.py", "pretrain/moe_layers.py"]
    errors = import_errors(path, line + "\n", paths)
    assert (not errors) == good, errors


@pytest.mark.parametrize("rule, path, text", [
    (docstring_errors, "a.py", "import math\n"),
    (docstring_errors, "a.py", '"""Words that are no sentence"""\n'),
    (docstring_errors, "a.sh", "#!/bin/bash\nset -e\n"),
    (length_errors, "a.py", '"""A."""\n' + "a = 1\n" * LINES),
    (name_errors, "yardstick/utils.py", ""),
    (name_errors, "common/a.md", ""),
    (content_errors, "a.md", "see /home" + "/someone/data"),
    (content_errors, "a.md", "see /root" + "/data"),
    (content_errors, "a.md", "see C:" + "\\Users\\me"),
    (content_errors, "a.md", "done \N{WHITE HEAVY CHECK MARK}"),
    (content_errors, "a.md", "go \N{ROCKET}"),
    (content_errors, "a.md", "a\N{ZERO WIDTH SPACE}b"),
])
def test_each_rule_finds_a_bad_example(rule, path, text):
    assert len(rule(path, text)) == 1


@pytest.mark.parametrize("rule, path, text", [
    (length_errors, "a.py", f'"""A.\n\nMore than {LINES} lines, because it is a table."""\n' + "a = 1\n" * LINES),
    (length_errors, "tests/a.py", "a = 1\n" * LINES * 2),
    (docstring_errors, "a.sh", "#!/bin/bash\n# Runs a.\n"),
    (docstring_errors, "env.sh", "# Is sourced.\n"),
    (content_errors, "a.md", "data=/path/to/text, 5 \u00d7 3 \u2265 2 \u2192 \u00e9\t."),
])
def test_rules_let_good_examples_pass(rule, path, text):
    assert not rule(path, text)
