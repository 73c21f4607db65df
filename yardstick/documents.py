"""Generated blocks of the documents: filled from records, formulas and programs, and checked.

A block stands between two comments in any .md file; what follows `=` is a Python expression:

    A rank holds <!-- = formulas.zero_state_bytes(params=124e6, ranks=2, stage=2) / GB | .1f -->1.2<!-- /= --> GB.

It sees the modules of MODULES, the units GB GiB MB MiB, and
    record("LABEL/RUN")     the record results/LABEL/RUN.json
    run("python FILE ...")  what that command prints, started in the root of the repository
    tree()                  the files of the repository with the first line of each
    code(text, language)    a text in a fence
A format may follow the last bar. (In a table cell write format(x, ".1f"): Markdown splits cells at a bar even
in a comment.) A value of several lines, or one whose comments stand on different lines, gets lines of its own.
Fences and inline code are left alone. `python -m yardstick.results refresh` fills, `check` compares.
"""

import ast
import functools
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

from yardstick import results

MODULES = ("formulas", "shapes", "deepspeed_memory", "deepspeed_traffic", "deepspeed_map", "deepspeed_explain",
           "deepspeed_annotate", "step_time", "schedules", "hardware", "plan")
UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}
SECONDS = 600                               # a command of a document may take this long

_SCAN = re.compile(r"""
    ^[ ]*(?P<fence>`{3,}|~{3,})[^\n]*\n(?:.*?^[ ]*(?P=fence)[`~]*[ ]*$|.*\Z)   # a fence, or one never closed
    | (?P<tick>`+)(?!`)[^\n]*?(?<!`)(?P=tick)(?!`)                             # inline code
    | <!--[ ]=[ ](?P<expression>.+?)[ ]-->(?:(?P<content>.*?)<!--[ ]/=[ ]-->)?
    | (?P<stray><!--[ ]/=[ ]-->)
    """, re.VERBOSE | re.DOTALL | re.MULTILINE)
_FORMAT = re.compile(r"(?P<expression>.+) \| (?P<format>[-+,_.0-9<>=^ ]*[a-zA-Z%]?)", re.DOTALL)

# What the tree says of paths that cannot say it themselves.
DESCRIPTIONS = {
    "LICENSE": "Apache-2.0", "NOTICE": "whose work this builds on", "CITATION.cff": "how to cite this repository",
    "pyproject.toml": "dependencies as ranges, settings of pytest", "constraints.txt": "the exact versions tested",
    "requirements.txt": "for pip install -r", "results": "committed records, one folder per machine",
    ".ci": "what continuous integration calls", "images": "figures, drawn by programs"}
HIDDEN = (".gitignore", ".gitattributes", "__init__.py")


def refresh(paths=None, root=None):
    """Fill the blocks of `paths` (default: every .md file). Returns (changed paths, errors)."""
    changed, errors = [], []
    for path, old, new, mistakes in _filled(paths, root):
        errors += mistakes
        if new != old:
            results.replace_file(path, new)
            changed.append(path)
    return changed, errors


def check(paths=None, root=None):
    """What is stale or wrong, as lines "file:line: ..."; empty when every block is fresh."""
    errors = []
    for path, old, new, mistakes in _filled(paths, root):
        errors += mistakes
        if new != old:
            before, after = old.splitlines() + [""], new.splitlines() + [""]
            line = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), 0)
            errors.append(f"{path}:{line + 1}: stale: it says {before[line]!r}, generated now: {after[line]!r}. "
                          f"Run python -m yardstick.results refresh.")
    return errors


def files(root=None):
    """Paths of the repository's files, sorted: all that git does not ignore; without git, all not hidden."""
    root = pathlib.Path(root or results.ROOT)
    try:
        names = subprocess.run(["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "-z"],
                               capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = [path.relative_to(root).as_posix() for path in root.rglob("*")]
        left_out = re.compile(r"(^|/)(\.(?!ci/)[^/]*|runs|__pycache__|[^/]*\.egg-info)/")
        names = [name for name in names if not left_out.search(name)]
    return sorted({name for name in names if name and (root / name).is_file()})


def tree(root=None, width=110):
    """The repository as a fenced list: each file with its first docstring, heading or comment line.

    A folder's line is that of its __init__.py or README.md. Folders below the top level that hold no Python,
    and the folders of tests/, are one line.
    """
    root = pathlib.Path(root or results.ROOT)
    paths, rows = files(root), []

    def walk(prefix):
        names = {path[len(prefix):].split("/")[0] for path in paths if path.startswith(prefix)}
        for name in sorted(names, key=lambda name: (prefix + name not in paths, name)):   # files, then folders
            path, indent = prefix + name, "  " * prefix.count("/")
            if path in paths:
                if name not in HIDDEN:
                    rows.append((indent + name, _first_line(root / path)))
                continue
            below = [p for p in paths if p.startswith(path + "/")]
            rows.append((indent + name + "/", _folder_line(root / path, below)))
            if any(p.endswith(".py") for p in below) and prefix != "tests/":
                walk(path + "/")

    walk("")
    column = max((len(name) for name, _ in rows), default=0) + 2
    lines = []
    for name, says in rows:
        first, *rest = textwrap.wrap(says, width - column) or [""]
        lines += [f"{name:<{column}}{first}".rstrip(), *(" " * column + line for line in rest)]
    return code("\n".join(lines))


def code(text, language="text"):
    """`text` in a fence of Markdown."""
    return f"```{language}\n{text.strip(chr(10))}\n```"


def _first_line(path):
    if path.name in DESCRIPTIONS:
        return DESCRIPTIONS[path.name]
    if path.suffix in (".json", ".png", ".svg"):
        return ""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    except (UnicodeDecodeError, SyntaxError):
        return ""
    if path.suffix == ".md":
        found = re.search(r"^#+ +(.+?)[ #]*$", text, re.MULTILINE)
    else:
        found = re.match(r"(?:#!.*\n)?\s*# *(.+)", text)
    return found[1].strip() if found else ""


def _folder_line(folder, below):
    if folder.name in DESCRIPTIONS:
        return DESCRIPTIONS[folder.name]
    for name in ("__init__.py", "README.md"):
        if (folder / name).is_file() and (line := _first_line(folder / name)):
            return line
    return f"tests of {folder.name}" if folder.parent.name == "tests" else ""


def _filled(paths, root):
    """For each document: (path, text as it is, text as it should be, errors)."""
    root = pathlib.Path(root or results.ROOT)
    names = {"record": lambda name: results.read(root / "results" / f"{name}.json", root=root), **UNITS,
             "run": functools.cache(lambda command: _run(command, root)), "tree": lambda: tree(root), "code": code}
    for path in paths or [root / name for name in files(root) if name.endswith(".md")]:
        path, errors = pathlib.Path(os.path.relpath(path)), []
        old = path.read_text(encoding="utf-8")
        yield path, old, _SCAN.sub(functools.partial(_fill, path, old, names, errors), old), errors


def _fill(path, text, names, errors, match):
    """The replacement of one match of _SCAN; an error leaves what stands there and is noted."""
    expression, content = match["expression"], match["content"]
    if expression is None and match["stray"] is None:
        return match[0]
    try:
        if expression is None or content is None or "<!-- = " in content:
            raise ValueError("one of the two comments of a block is missing")
        value = _evaluate(expression, names)
        if "\n" in content or "\n" in value:
            value = "\n" + value.strip("\n") + "\n"
        elif text[:match.start()].rpartition("\n")[2].strip() == "":
            raise ValueError("an inline block must not begin a line, Markdown takes that line for HTML; "
                             "put a word before it")
        return f"<!-- = {expression} -->{value}<!-- /= -->"
    except Exception as error:                      # whatever an expression of a document can raise
        line = text.count("\n", 0, match.start()) + 1
        errors.append(f"{path}:{line}: {match[0].splitlines()[0][:100]}: {type(error).__name__}: {error}")
        return match[0]


def _evaluate(expression, names):
    """The text that an expression gives, after its format."""
    formatted = _FORMAT.fullmatch(expression)
    source = (formatted["expression"] if formatted else expression).strip()
    used = {node.id for node in ast.walk(ast.parse(source, mode="eval")) if isinstance(node, ast.Name)}
    modules = {name: importlib.import_module(f"yardstick.{name}") for name in MODULES if name in used}
    value = eval(source, {**names, **modules})
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"the expression gives a {type(value).__name__}; a block takes text or a number")
    value = format(value, formatted["format"] if formatted else "")
    if "<!-- = " in value or "<!-- /= -->" in value:
        raise ValueError("the value holds the comments of a block itself")
    return value


def _run(command, root):
    program, *arguments = shlex.split(command)
    if program != "python":
        raise ValueError(f"run({command!r}): only commands that begin with python are run")
    done = subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=SECONDS,
                          env={**os.environ, "PYTHONPATH": str(root), "NO_COLOR": "1", "COLUMNS": "100"})
    if done.returncode:
        raise ValueError(f"{command} ended with exit status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout.rstrip()
