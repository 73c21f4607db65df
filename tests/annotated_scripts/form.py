"""What an annotated script looks like: two columns, numbered sections, a note at each call into DeepSpeed."""

import ast
import re

from yardstick.deepspeed_proof import runs, statements

CODE, NOTE, WIDTH = 67, 69, 120               # last column of code, where #| begins (from 0), last column
HEADING = re.compile(r"# == (\d+)\. (.+) \((not upstream|upstream [^()]+)\) =*")
UPSTREAM = re.compile(r"DeepSpeedExamples/(?:blob|tree)/([0-9a-f]{7,40})/(\S+)")


def body_of(text):
    """The number of the first line after the module's docstring."""
    return ast.parse(text).body[0].end_lineno + 1


def column_errors(path, text):
    """Code ends in column 67, a note begins with #| in column 70 and ends by 120; other comments are headings of sections."""
    errors, start = [], body_of(text)
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > WIDTH:
            errors.append(f"{path}:{number}: {len(line)} columns, more than {WIDTH}")
        if number < start or line.startswith("# == "):
            continue
        code, bar, _ = line.partition("#|")
        if len(code.rstrip()) > CODE:
            errors.append(f"{path}:{number}: its code ends in column {len(code.rstrip())}, after {CODE}")
        if bar and line.index("#|") != NOTE:
            errors.append(f"{path}:{number}: its note begins in column {line.index('#|') + 1}, not in {NOTE + 1}")
        if bar and not re.match(r" \S", line[NOTE + 2:]):
            errors.append(f"{path}:{number}: no words, or not one space, after #|")
        if not bar and re.search(r"(^|\s)#(?!!)", re.sub(r"(['\"]).*?\1", "", line)):
            errors.append(f"{path}:{number}: a comment that is no note; write it after #|")
    return errors


def section_errors(path, text):
    """Sections are numbered from 1, say their lines upstream, and each has a note; the docstring names upstream's file and commit."""
    errors, lines = [], text.splitlines()
    if not UPSTREAM.search(ast.get_docstring(ast.parse(text))):
        errors.append(f"{path}:1: its docstring has no link to upstream's file at a commit")
    if not runs(text):
        errors.append(f"{path}:1: its docstring has no paragraph Proof:")
    heads = [number for number, line in enumerate(lines) if line.startswith("# ==")]
    if len(heads) < 3:
        errors.append(f"{path}: {len(heads)} sections")
    for place, (first, after) in enumerate(zip(heads, [*heads[1:], len(lines)]), 1):
        match = HEADING.fullmatch(lines[first])
        if not match or int(match[1]) != place:
            errors.append(f"{path}:{first + 1}: no heading like '# == {place}. Title (upstream 10-20) ===='")
        if not any("#|" in line for line in lines[first:after]):
            errors.append(f"{path}:{first + 1}: a section without a note")
    return errors


def call_errors(path, text):
    """Each statement that calls into DeepSpeed has a note beside it: deepspeed.x(), engine.x(), an imported name of it."""
    tree, lines, errors = ast.parse(text), text.splitlines(), []
    names = {"deepspeed", "engine"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            names |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.asname for alias in node.names if alias.asname and alias.name.split(".")[0] == "deepspeed"}
    spans = statements(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        root = node.func
        while isinstance(root, (ast.Attribute, ast.Call)):
            root = root.value if isinstance(root, ast.Attribute) else root.func
        if isinstance(root, ast.Name) and root.id in names:
            first, last = min((span for span in spans if span[0] <= node.lineno <= span[1]), key=lambda span: span[1] - span[0])
            if not any("#|" in line for line in lines[first - 1:last]):
                errors.append(f"{path}:{node.lineno}: {ast.unparse(node.func)} is called without a note")
    return errors


RULES = [column_errors, section_errors, call_errors]


def errors(path, text):
    return [error for rule in RULES for error in rule(path, text)]


if __name__ == "__main__":
    import sys
    found = [error for path in sys.argv[1:] for error in errors(path, open(path, encoding="utf-8").read())]
    sys.exit("\n".join(found) or 0)
