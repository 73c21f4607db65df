"""Generated blocks of documents are filled, found stale, and left alone where they are only shown."""

import os
import subprocess
import sys

import pytest

from yardstick import documents, results


@pytest.fixture
def document(tmp_path):
    """A function: the text of a document -> (errors of check, text after refresh, errors of refresh)."""
    results.write("strategies/3_zero_stage2", label="cpu2", root=tmp_path, command="bash run.sh", settings={},
                  measured={"step_seconds": 0.5, "optimizer_bytes": 1_500_000_000}, predicted={})
    (tmp_path / "show.py").write_text("import sys\nprint('| a |\\n|---|')\nsys.exit('sys.argv' in sys.argv[1:])\n")
    path = tmp_path / "page.md"

    def use(text):
        path.write_text(text)
        stale = documents.check(root=tmp_path)
        _, errors = documents.refresh(root=tmp_path)
        return stale, path.read_text(), errors
    return use


def block(expression, content=""):
    return f"<!-- = {expression} -->{content}<!-- /= -->"


@pytest.mark.parametrize("expression, value", [
    ('record("cpu2/strategies/3_zero_stage2")["measured"]["step_seconds"]', "0.5"),
    ('record("cpu2/strategies/3_zero_stage2")["measured"]["optimizer_bytes"] / GB | .2f', "1.50"),
    ("3 | 4", "   3"),                    # what follows the last bar is a format, here a width
    ("(1 | 6) + 0 | ,d", "7"),
    ("'a | b'", "a | b"),
    ("2 * GiB - GiB - 1024 * MiB + MB // 10**6", "1"),
    ("1234567 | ,", "1,234,567"),
])
def test_an_inline_block_is_filled(document, expression, value):
    stale, text, errors = document(f"# Page\n\nIt is {block(expression, 'old')} here.\n")
    assert text == f"# Page\n\nIt is {block(expression, value)} here.\n" and not errors
    assert len(stale) == 1 and "page.md:3: stale" in stale[0]
    assert document(text) == ([], text, [])


@pytest.mark.parametrize("content", ["", "\n", "\nold\nlines\n"])
def test_a_block_of_lines_is_filled(document, content):
    _, text, errors = document(block('run("python show.py")', content) + "\n")
    assert text == block('run("python show.py")', "\n| a |\n|---|\n") + "\n" and not errors
    assert document(text)[0] == []


def test_a_fence_may_be_generated_and_fences_are_left_alone(document):
    shown = block("1 + 1", "old")
    left = f"```\n{shown}\n```\n\n~~~~md\n{shown}\n~~~\n~~~~\n\n`{shown}` and ``a ` {shown}``\n"
    assert document(left) == ([], left, [])
    _, text, errors = document(left + block("code('a')") + "\n\nTwo: " + shown)
    assert text == left + block("code('a')", "\n```text\na\n```\n") + "\n\nTwo: " + block("1 + 1", "2")
    assert not errors
    unclosed = f"```\n{shown}\n"
    assert document(unclosed) == ([], unclosed, [])


@pytest.mark.parametrize("text, says", [
    ("a " + block("1 / 0", "old"), "ZeroDivisionError"),
    ("a " + block("1 +", "old"), "SyntaxError"),
    ("a " + block("[1]"), "gives a list"),
    ("a " + block("nothing"), "name 'nothing' is not defined"),
    ("a <!-- = 1 --> b", "one of the two comments"),
    ("a <!-- = 1 --> b <!-- = 2 -->2<!-- /= -->", "one of the two comments"),
    ("a <!-- /= -->", "one of the two comments"),
    (block("1", "1"), "must not begin a line"),
    ("a " + block("record('a')"), "no record results/a.json"),
    ("a " + block("run('ls')"), "only commands that begin with python"),
    ("a " + block("run('python show.py sys.argv')"), "python show.py sys.argv ended with exit status 1"),
    ("a " + block("'<!-- ' + '= 1'"), "the value holds the comments of a block"),
])
def test_a_wrong_block_is_an_error_and_stays(document, text, says):
    stale, after, errors = document(f"# Page\n\n{text}\n")
    assert after == f"# Page\n\n{text}\n"
    assert stale == errors and len(errors) == 1 and "page.md:3: " in errors[0] and says in errors[0]


def test_an_error_does_not_keep_others_from_being_filled(document):
    _, text, errors = document(f"a {block('1 / 0', 'x')} {block('2', 'x')}\n")
    assert text == f"a {block('1 / 0', 'x')} {block('2', '2')}\n" and len(errors) == 1


def test_tree(tmp_path):
    for name, text in {
            "README.md": "Text\n\n# The title\n", "LICENSE": "x", ".gitignore": "", "long.sh": "# " + "word " * 30,
            "folder/__init__.py": '"""A folder."""\n', "folder/a.py": '"""First line.\n\nMore."""\n',
            "folder/run.sh": "#!/bin/bash\n# Runs a.\n", "folder/config.json": "{}", "folder/images/c.png": "",
            "folder/card/README.md": "# The card\n", "folder/card/b.txt": "", "results/cpu2/r.json": "{}",
            ".ci/run": "#!/bin/sh\n# All.\n", "tests/folder/test_a.py": "", "runs/folder/x": "",
            "folder/__pycache__/a.pyc": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    lines = documents.tree(tmp_path).split("\n")
    assert lines[0] == "```text" and lines[-1] == "```" and max(map(len, lines)) <= 110
    assert [" ".join(line.split()) for line in lines[1:-1] if not line.startswith(" " * 15)] == [
        "LICENSE Apache-2.0", "README.md The title", "long.sh " + ("word " * 19).strip(),
        ".ci/ what continuous integration calls", "folder/ A folder.", "a.py First line.", "config.json",
        "run.sh Runs a.", "card/ The card", "images/ figures, drawn by programs",
        "results/ committed records, one folder per machine", "tests/", "folder/ tests of folder"]


def test_the_command_line(tmp_path):
    def run(*arguments):
        done = subprocess.run([sys.executable, "-m", "yardstick.results", *arguments], cwd=tmp_path, text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(results.ROOT)})
        return done.returncode, done.stdout + done.stderr
    page = tmp_path / "page.md"
    page.write_text(f"a {block('1 + 1', 'old')}\n")
    status, says = run("check", "page.md")
    assert status == 1 and "page.md:1: stale" in says and "refresh" in says
    assert run("refresh", "page.md") == (0, "filled page.md\n") and block("1 + 1", "2") in page.read_text()
    assert run("check", "page.md") == (0, "every generated block is fresh\n")
    assert run("list")[0] == 0 and run("lst")[0] == 2
    status, says = run("check", "nothing.md")
    assert status == 1 and "Traceback" not in says and "nothing.md" in says
