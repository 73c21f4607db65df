"""Documents are true: links, generated blocks, shown commands, named files, and symbols of DeepSpeed.

Each rule is a function of a document's path and text that returns what is wrong; it is run over every .md file of
the repository, and on small repositories with a mistake, so that it is known to be able to find one.
"""

import ast
import functools
import importlib.util
import pathlib
import posixpath
import re
import shlex
import subprocess
import urllib.parse

import pytest

from yardstick import deepspeed_citations, deepspeed_map, documents, settings
from yardstick.results import ROOT

FENCE = re.compile(r"^ *(?P<fence>`{3,}|~{3,}) *(?P<language>[\w-]*)[^\n]*\n"
                   r"(?P<code>.*?)(?:^ *(?P=fence)[`~]* *$|\Z)", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(?!`)([^\n]*?)(?<!`)\1(?!`)")            # inline code
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)\n]*\)"            # [text](target), ![text](target)
                  r"|^ *\[[^\]\n]+\]: *<?(\S+?)>?(?: |$)"       # [label]: target
                  r"|\b(?:src|href)=\"([^\"]+)\"", re.MULTILINE)
HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?[^\n]*\n.*?^\s*\1$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^(#{1,6}) +(.+?) *#*$", re.MULTILINE)
PLACEHOLDER = re.compile(r"(^|/)([A-Z_]+|N_name)(/|$)")          # strategies/N/run.sh, results/LABEL/...
ELSEWHERE = re.compile(r"[a-z+]+:|//")                            # a link that leaves the repository


def blank(pattern, text):
    """`text` with the matches of `pattern` emptied, its lines kept."""
    return pattern.sub(lambda match: "\n" * match[0].count("\n"), text)


def line_of(text, position):
    return text.count("\n", 0, position) + 1


class Repository:
    """The files of a folder as documents see them: paths, folders, texts, CONFIG dicts."""

    def __init__(self, root):
        self.root, self.paths = root, set(documents.files(root))
        self.folders = {str(folder) for path in self.paths for folder in pathlib.PurePosixPath(path).parents}
        self.text = functools.cache(lambda path: (root / path).read_text(encoding="utf-8"))
        self.config = functools.cache(self._config)

    def has(self, path):
        path = posixpath.normpath(path)
        return path in self.paths or path in self.folders

    def _config(self, path):
        """The CONFIG dict of a program, read without importing it, or None when it has none."""
        if path not in self.paths:
            return None
        for node in ast.parse(self.text(path)).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONFIG":
                try:
                    names = {"Either": settings.Either, "Choice": settings.Choice, "settings": settings}
                    names |= {kind.__name__: kind for kind in (int, float, str, bool)}
                    return eval(ast.unparse(node.value), {"__builtins__": {}, **names})
                except Exception:                                 # it needs more: only its keys are known
                    keys = re.findall(r"^\s*[\"'](\w+)[\"']\s*:", ast.get_source_segment(
                        self.text(path), node.value), re.MULTILINE)
                    base = self.config("real_model_example.py") if path != "real_model_example.py" else {}
                    return {**(base or {}), **{key: settings.Either(str) for key in keys}}
        return None


# Links

def slug(heading):
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(text):
    found, seen = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text)), {}
    for heading in HEADING.finditer(blank(FENCE, text)):
        name = slug(heading[2])
        found.add(name if name not in seen else f"{name}-{seen[name]}")
        seen[name] = seen.get(name, 0) + 1
    return found


def link_errors(path, text, repository):
    errors, prose = [], blank(CODE, blank(FENCE, text))
    for match in LINK.finditer(prose):
        target = next(filter(None, match.groups()))
        if ELSEWHERE.match(target):
            continue
        file, _, anchor = urllib.parse.unquote(target).partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), file)) if file else path
        if file != "." and not repository.has(file):
            errors.append(f"{path}:{line_of(prose, match.start())}: the link {target} leads to no file in git")
        elif anchor and not (file.endswith(".md") and anchor in anchors(repository.text(file))):
            errors.append(f"{path}:{line_of(prose, match.start())}: {file} has no heading #{anchor}")
    return errors


def mention_errors(path, text, repository):
    """Inline code that reads like a file of the repository is one."""
    errors, prose = [], blank(FENCE, text)
    for match in CODE.finditer(prose):
        name = match[2].strip().removesuffix("/")
        if (re.fullmatch(r"[\w.-]+(/[\w.-]+)+", name) and name.split("/")[0] in repository.folders
                and not PLACEHOLDER.search(name) and not repository.has(name)
                and not repository.has(posixpath.join(posixpath.dirname(path), name))):
            errors.append(f"{path}:{line_of(prose, match.start())}: `{name}` is no file in git")
    return errors


# Commands

def commands(code):
    """[(line, words)] of the simple commands in a block of bash; comments and redirections left out."""
    found, waiting, first = [], "", 0
    code = blank(HEREDOC, code)
    for number, line in enumerate(code.replace("\\\n", " \n").split("\n")):
        first = first if waiting else number
        waiting += line + "\n"
        lexer = shlex.shlex(waiting, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:                                        # a quotation goes on in the next line
            continue
        if code.split("\n")[number].endswith("\\"):
            continue
        waiting, simple = "", []
        while words:
            word = words.pop(0)
            if set(word) <= set("();|&") or word in ("do", "then", "else", "sudo", "time", "{", "}"):
                found, simple = found + [(first, simple)], []
            elif set(word) <= set("<>&"):
                words = words[1:]                                 # the file of a redirection
            else:
                simple.append(word)
        found.append((first, simple))
    return [(line, words) for line, words in found if words]


def words_errors(words, folder, repository):
    """What is wrong with one simple command given in `folder`."""
    while words and re.match(r"\w+=", words[0]):                  # RANKS=4 bash run.sh
        words = words[1:]
    errors = []
    if "-m" in words[:-1] and words[0].startswith("python"):
        module = words[words.index("-m") + 1]
        place = module.replace(".", "/")
        top = module.split(".")[0]
        if not (repository.has(f"{place}.py") or repository.has(f"{place}/__main__.py")
                or (top not in repository.folders and importlib.util.find_spec(top))):
            errors.append(f"there is no module {module}")
        return errors
    program = None
    for i, word in enumerate(words):
        name = word.removeprefix("./")
        tops = name.split("/")[0] in repository.folders and "/" in name
        if (not re.fullmatch(r"[\w./-]+", name) or name.startswith(("/", "-", "runs/", "path/to/", "my_", "your_"))
                or PLACEHOLDER.search(name) or not (tops or re.search(r"\.(py|sh|json|md|toml|txt)$", name))):
            continue
        file = posixpath.normpath(posixpath.join(folder, name))
        if not repository.has(file):
            errors.append(f"there is no {file}")
        elif program is None and file.endswith((".py", ".sh")):
            program, arguments = file, words[i + 1:]
    if program:
        source = "real_model_example.py" if re.fullmatch(r"strategies/[^/]+/run\.sh", program) else program
        config = repository.config(source) if source.endswith(".py") else None
        given = [word for word in arguments if word != "key=value" and not re.search(r"[\[\]<>$]|\.\.\.", word)]
        try:
            settings.override(config, given, where=source) if config is not None else None
        except settings.SettingsError as error:
            errors.append(str(error))
    return errors


def command_errors(path, text, repository):
    errors = []
    for match in FENCE.finditer(text):
        if match["language"] not in ("bash", "sh", "shell"):
            continue
        start, code = line_of(text, match.start("code")), match["code"]
        done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
        if done.returncode:
            errors.append(f"{path}:{start}: bash does not parse this: {done.stderr.strip()}")
            continue
        folder, cloned = ".", None
        for line, words in commands(code):
            if words[:2] == ["git", "clone"]:
                cloned = words[-1].rstrip("/").rpartition("/")[2].removesuffix(".git")
            elif words[0] == "cd" and len(words) == 2 and words[1] == cloned:
                folder = "."
            elif words[0] == "cd" and len(words) == 2:
                folder = posixpath.normpath(posixpath.join(folder, words[1]))
                if not repository.has(folder):
                    errors.append(f"{path}:{start + line}: there is no folder {folder}")
            else:
                errors += [f"{path}:{start + line}: {' '.join(words)}: {error}"
                           for error in words_errors(words, folder, repository)]
    return errors


# Symbols of DeepSpeed

@functools.cache
def parsed(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def definitions(body):
    """{name: node} of what statements define, also under if, try, with and for."""
    found = {}
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name): node for alias in node.names}
        else:
            for block in ("body", "orelse", "finalbody"):
                found |= definitions(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                found |= definitions(handler.body)
    return found


def resolves(file, symbol):
    """Whether `symbol` ("Class.method", "function", "Class.attribute") is defined in a Python file."""
    node = parsed(file)
    for part in symbol.split("."):
        inside = definitions(getattr(node, "body", []))
        if part not in inside and isinstance(node, ast.ClassDef):  # set on self in one of its methods
            return any(isinstance(n, ast.Attribute) and n.attr == part and isinstance(n.ctx, ast.Store)
                       for n in ast.walk(node))
        if part not in inside:
            return False
        node = inside[part]
    return True


def symbol_errors(path, text, package):
    """The section "Where in DeepSpeed" names what is there, as an anchor, `ds:engine.step`, or as
    `runtime/engine.py: DeepSpeedEngine.step` or `deepspeed.initialize`."""
    errors, prose = [], blank(FENCE, text)
    for heading in HEADING.finditer(prose):
        if "where in deepspeed" not in heading[2].lower():
            continue
        rest = prose[heading.end():]
        after = next((h for h in HEADING.finditer(rest) if len(h[1]) <= len(heading[1])), None)
        rest = rest[:after.start() if after else None]
        cited = deepspeed_citations.cited_names(rest)
        named = len(cited)
        errors += [f"{path}:{line_of(prose, heading.end()) + line - 1}: ds:{name} is no anchor (yardstick/deepspeed_map.json)"
                   for line, name in cited if name not in deepspeed_map.ANCHORS]
        for match in CODE.finditer(rest):
            if found := re.fullmatch(r"(?:deepspeed/)?([\w/]+\.py)(?: *: *([\w.]+)(?:\(\))?)?", match[2].strip()):
                file, symbol = package / found[1], found[2]
            elif re.fullmatch(r"deepspeed(\.\w+)+(\(\))?", match[2]):
                parts = match[2].removesuffix("()").split(".")[1:]
                file = package
                while parts and ((file / parts[0]).is_dir() or (file / f"{parts[0]}.py").exists()):
                    file /= parts[0] if (file / parts[0]).is_dir() else f"{parts[0]}.py"
                    parts = parts[1:]
                file, symbol = file / "__init__.py" if file.is_dir() else file, ".".join(parts)
            else:
                continue
            named += 1
            if not file.exists() or (symbol and not resolves(file, symbol)):
                line = line_of(prose, heading.end() + match.start())
                errors.append(f"{path}:{line}: `{match[2]}` is not in the installed DeepSpeed")
        if not named:
            errors.append(f"{path}:{line_of(prose, heading.start())}: this section names no symbol of DeepSpeed")
    return errors


# The repository

@pytest.fixture(scope="module")
def repository():
    return Repository(ROOT)


def none(errors):
    errors = "\n".join(errors)
    assert not errors, "\n" + errors


@pytest.mark.parametrize("rule", [link_errors, mention_errors, command_errors], ids=lambda rule: rule.__name__)
def test_rule(repository, rule):
    none(error for path in sorted(repository.paths) if path.endswith(".md")
         for error in rule(path, repository.text(path), repository))


def test_generated_blocks_are_fresh():
    none(documents.check())


def test_symbols_of_deepspeed(repository):
    found = importlib.util.find_spec("deepspeed")
    if not found:
        pytest.skip("deepspeed is not installed")
    package = pathlib.Path(found.submodule_search_locations[0])
    none(error for path in sorted(repository.paths) if path.endswith(".md")
         for error in symbol_errors(path, repository.text(path), package))


# Each rule can fail

@pytest.fixture
def small(tmp_path):
    """A small repository: a program with a CONFIG, one whose CONFIG cannot be read whole, a strategy, a guide."""
    for name, text in {
            "real_model_example.py": "from yardstick.settings import Choice\nKEY = 1\nCONFIG = {\n"
                                     '    "strategy": Choice("zero2", "dp"),\n    "steps": 20,   # steps\n}\n',
            "strategies/compare.py": 'import real_model_example\nCONFIG = {\n    **real_model_example.CONFIG,\n'
                                     '    "table": KEY,\n}\n',
            "strategies/3_zero_stage2/run.sh": "", "strategies/README.md": "# Here\n",
            "yardstick/results.py": "", "yardstick/__init__.py": "",
            "guide.md": "# Guide\n\n## What it `is`, and why\n\n## Two\n\n## Two\n<a id=\"mark\"></a>\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Repository(tmp_path)


@pytest.mark.parametrize("target, good", [
    ("../guide.md", True), ("compare.py", True), ("3_zero_stage2/", True), ("..", True), ("#Here", False),
    ("#here", True), ("../guide.md#what-it-is-and-why", True), ("../guide.md#two-1", True),
    ("../guide.md#mark", True), ("https://example.org/none", True), ("mailto:a@example.org", True),
    ("guide.md", False), ("../guide.md#nothing", False), ("../../outside.md", False), ("Compare.py", False),
    ("compare.py#L3", False), ("images/none.png", False)])
@pytest.mark.parametrize("form", ["a [text `x`]({})", "![picture]({} \"title\")", "[a]\n\n[a]: {}\n",
                                  '<img src="{}" width="3">', "[![badge]({})](https://example.org)"])
def test_links(small, target, good, form):
    text = f"# Here\n\n{form.format(target)}\n\n`[not]({target}x)`\n```\n[nor]({target}x)\n```\n"
    errors = link_errors("strategies/README.md", text, small)
    assert (not errors) == good and all(re.match(r"strategies/README\.md:[345]: ", error) for error in errors)


@pytest.mark.parametrize("mention, good", [
    ("yardstick/results.py", True), ("3_zero_stage2/run.sh", True), ("strategies/3_zero_stage2/", True),
    ("results/LABEL/x.json", True), ("runtime/engine.py", True), ("a/b = c", True),
    ("yardstick/nothing.py", False), ("strategies/9_none/", False)])
def test_mentions(small, mention, good):
    assert (not mention_errors("strategies/README.md", f"see `{mention}`\n", small)) == good


@pytest.mark.parametrize("command, says", [
    ("bash strategies/3_zero_stage2/run.sh steps=3 strategy=dp", ""),
    ("RANKS=4 bash strategies/3_zero_stage2/run.sh  # a comment, isn't it", ""),
    ("cd strategies/3_zero_stage2 && bash run.sh steps=3", ""),
    ("git clone https://example.org/a/house.git\ncd house\nbash strategies/3_zero_stage2/run.sh", ""),
    ("python strategies/compare.py table=cpu2 \\\n    steps=3 | tee runs/log.txt", ""),
    ("torchrun --nproc_per_node=2 real_model_example.py strategy=zero2 [key=value ...]", ""),
    ("deepspeed --num_gpus=1 real_model_example.py key=value", ""),
    ("python -m yardstick.results check && python -m venv .venv", ""),
    ("python -c 'a = 1\nprint(a)' > new.json", ""),
    ("for n in 1 2; do bash strategies/3_zero_stage2/run.sh steps=$n; done", ""),
    ("ls strategies/2_none\ncat > a.json <<EOF\n{}\nEOF\nls strategies", "page.md:4: ls strategies/2_none"),
    ("cat > runs/a.json <<EOF\n{\"it's\": 1}\nbash none.sh\nEOF\nls strategies", ""),
    ("bash strategies/N/run.sh", ""),
    ("python my_script.py; cat path/to/config.json results/LABEL/a.json ~/x.json", ""),
    ("if true; then", "does not parse"),
    ("bash strategies/2_none/run.sh", "page.md:4: bash strategies/2_none/run.sh: there is no strategies/2_none"),
    ("ls\nls strategies/2_none", "page.md:5: ls strategies/2_none: there is no strategies/2_none"),
    ("cd strategies/2_none", "no folder strategies/2_none"),
    ("bash run.sh", "there is no run.sh"),
    ("bash strategies/3_zero_stage2/run.sh stepz=3", "Did you mean steps?"),
    ("python real_model_example.py \\\n  steps=many", "not a whole number"),
    ("python real_model_example.py strategy=zero4", "is none of zero2, dp"),
    ("python real_model_example.py --steps 3", "not key=value"),
    ("for n in 1 2; do python real_model_example.py steps=$n step=3; done", "Did you mean steps?"),
    ("python strategies/compare.py tabel=cpu2", "Did you mean table?"),
    ("python -m yardstick.none", "no module yardstick.none"),
    ("python -m surely_not_installed", "no module surely_not_installed"),
])
def test_commands(small, command, says):
    text = f"# Page\n\n```bash\n{command}\n```\n\n```text\nbash none.sh (\n```\n"
    errors = command_errors("page.md", text, small)
    assert (not errors) if not says else (len(errors) == 1 and says in errors[0]), errors


@pytest.mark.parametrize("symbols, bad", [
    ("`runtime/engine.py: DeepSpeedEngine.step` and `runtime/engine.py:DeepSpeedEngine.config`", 0),
    ("`deepspeed.initialize()`, `deepspeed.runtime.engine.DeepSpeedEngine`, `deepspeed/runtime/engine.py`", 0),
    ("`runtime/engine.py: helper.inner`, `runtime/engine.py: LIMIT`, `runtime/engine.py: Late`, `stage=2`", 0),
    ("`ds:engine.step`, which is ds:zero3.step.", 0),
    ("`ds:engine.stop`", 1),
    ("`runtime/engine.py: DeepSpeedEngine.stop`", 1),
    ("`runtime/engines.py: DeepSpeedEngine.step` and `deepspeed.initialise`", 2),
    ("`deepspeed.runtime.engine.step`", 1),
    ("no symbol at all, only `stage=2`", 1),
])
def test_symbols(tmp_path, symbols, bad):
    (tmp_path / "runtime").mkdir()
    (tmp_path / "__init__.py").write_text("def initialize():\n    pass\n")
    (tmp_path / "runtime/engine.py").write_text(
        "LIMIT = 1\n\nclass DeepSpeedEngine:\n    def step(self):\n        self.config = 1\n\n"
        "def helper():\n    def inner():\n        pass\n\n"
        "try:\n    import x\nexcept ImportError:\n    class Late:\n        pass\n")
    text = (f"# Card\n\n`runtime/none.py: x`\n\n## 9. Where in DeepSpeed\n\n{symbols}\n\n"
            f"## 10. Exercises\n\n`runtime/none.py`\n")
    errors = symbol_errors("card.md", text, tmp_path)
    assert len(errors) == bad and all(re.match(r"card\.md:[57]: ", error) for error in errors), errors
