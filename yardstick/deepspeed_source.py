"""The source of a DeepSpeed package, read and never imported: symbols by name, their code, where they went.

A symbol is the dotted path of classes and functions as they are nested in a file, without `<locals>` and without mangling:
DeepSpeedZeroOptimizer.create_gradient_handling_hooks.wrapper.grad_handling_hook. Line numbers are looked up, never stored.
"""

import ast
import functools
import hashlib
import importlib.util
import re
from pathlib import Path

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
IGNORED = {"ctx", "kind", "type_comment", "type_params"}     # of a syntax tree: no meaning here, or not in every Python


class Package:
    """A DeepSpeed package in a folder."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.version = _version(self.folder)

    @classmethod
    def at(cls, folder=None):
        """The package in `folder` (deepspeed/ itself or what holds it); without one, that of this Python.

        Raises ValueError where there is none.
        """
        if folder is None:
            found = importlib.util.find_spec("deepspeed")    # of a top-level name: finds, does not import
            if not found or not found.submodule_search_locations:
                raise ValueError("no DeepSpeed is installed in this Python. Install it (pip install -r requirements.txt), or "
                                 "give --package DIR.")
            return cls(found.submodule_search_locations[0])
        for place in (Path(folder) / "deepspeed", Path(folder)):
            if (place / "runtime" / "engine.py").is_file():
                return cls(place)
        raise ValueError(f"{folder} holds no DeepSpeed: neither deepspeed/runtime/engine.py nor runtime/engine.py is in it. Give "
                         "the folder that holds deepspeed/.")

    @functools.cache
    def text(self, file):
        """The text of a file, "" where there is none. A source tree keeps accelerator/ beside deepspeed/, not in it."""
        beside = self.folder.parent if (self.folder.parent / "version.txt").is_file() else self.folder
        for folder in (self.folder, beside):
            try:
                return (folder / file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
        return ""

    @functools.cache
    def symbols(self, file):
        """{dotted name: node} of every class and function of a file; a name defined twice keeps its first place."""
        found = {}

        def walk(statements, prefix):
            for node in statements:
                inner = prefix
                if isinstance(node, DEFINITIONS):
                    inner = f"{prefix}{node.name}."
                    found.setdefault(inner[:-1], node)
                for block in BLOCKS:
                    walk(getattr(node, block, ()), inner)
        try:
            walk(ast.parse(self.text(file)).body, "")
        except SyntaxError as error:
            raise ValueError(f"{self.folder / file}:{error.lineno} does not parse: {error.msg}. Reinstall DeepSpeed.") from None
        return found

    def find(self, file, symbol):
        """The node of a symbol, or None."""
        return self.symbols(file).get(symbol)

    @functools.cache
    def digest(self, file, symbol):
        """16 hexadecimal digits of a symbol's code: the same whatever its name, comments, docstrings, layout and place."""
        return hashlib.sha256(form(self.find(file, symbol), IGNORED | {"name"}).encode()).hexdigest()[:16]

    @functools.cached_property
    def files(self):
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.py"))

    def elsewhere(self, file, symbol, digest):
        """(file, symbol) where a symbol that is not in its place may be found, or None: the same code under another name in its
        file, or the same name in another file or another class of its file."""
        name = symbol.rpartition(".")[2]
        known = self.symbols(file)
        for other in known:
            if self.digest(file, other) == digest:
                return file, other
        named = [(file, other) for other in known if other.rpartition(".")[2] == name]
        definition = re.compile(rf"^\s*(?:async )?(?:def|class) {re.escape(name)}\b", re.MULTILINE)
        last_two = symbol.split(".")[-2:]
        for path in self.files:
            if path != file and definition.search(self.text(path)):
                for other in self.symbols(path):
                    if other.rpartition(".")[2] == name and self.digest(path, other) == digest:
                        return path, other
                    if other.split(".")[-2:] == last_two:
                        named.append((path, other))
        return named[0] if len(named) == 1 and not name.startswith("__") else None

    def lines(self, file, symbol):
        """(first, last) line of a symbol, its decorators included."""
        node = self.find(file, symbol)
        return min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno

    def landmarks(self, file, symbol, landmark):
        """Lines of a symbol on which the expression `landmark` begins."""
        wanted = ast.parse(landmark, mode="eval").body
        shape = form(wanted)
        return sorted({node.lineno for node in ast.walk(self.find(file, symbol))
                       if type(node) is type(wanted) and form(node) == shape})

    def enclosing(self, file, line):
        """Symbols of a file that hold a line, the innermost first."""
        holding = [symbol for symbol in self.symbols(file)
                   if self.lines(file, symbol)[0] <= line <= self.lines(file, symbol)[1]]
        return sorted(holding, key=lambda symbol: -symbol.count("."))


def form(node, without=IGNORED):
    """The text of a syntax tree without places, docstrings and bare strings: equal for equal code in any Python from 3.11.

    without: fields of the node itself that are left out.
    """
    if isinstance(node, ast.AST):
        fields = [f"{field}={form(value)}" for field, value in ast.iter_fields(node)
                  if field not in without and value is not None and value != []]
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(form(item) for item in node if not _is_remark(item))}]"
    return repr(node)


def _is_remark(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _version(folder):
    """The release of a package: what its build wrote, the version.txt of a source folder, or "unknown"."""
    for path, pattern in ((folder / "git_version_info_installed.py", r"^version='\s*([^'\s]+)"),
                          (folder.parent / "version.txt", r"^\s*(\S+)")):
        if path.is_file() and (found := re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)):
            return found[1]
    return "unknown"
