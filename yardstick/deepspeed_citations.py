"""Citations of anchors: where the texts of this repository say ds:GROUP.NAME, and what stands around a line.

A citation is the word ds: with the name of an anchor of deepspeed_map.json, as in ds:zero3.step, in any text: prose or inline
code of a document, a comment of a program, a // comment of a config. In deepspeed_config.json a key cites the anchor of the
symbol that reads it. tests/, results/ and the map itself are not scanned: what stands there explains nothing to a reader.
"""

import ast
import re
from pathlib import Path

from yardstick import documents, results

CITATION = re.compile(r"(?<!\w)ds:([a-z][\w.]*\w)")
READER = re.compile(r'"read": "([\w/]+\.py):([\w.]+)"')             # deepspeed_config.json: who reads a key
NOT_SCANNED = re.compile(r"(tests|results|runs)/|yardstick/deepspeed_(map|source|citations|proof)\b|.*\.(png|svg)$")


def cited_names(text):
    """[(line, name)] of every citation in a text, whether the anchor exists or not.

    >>> cited_names("the update (ds:zero3.step), after ds:zero3.norms.")
    [(1, 'zero3.step'), (1, 'zero3.norms')]
    """
    return [(number, match[1]) for number, line in enumerate(text.splitlines(), 1) for match in CITATION.finditer(line)]


def citations(places=(), root=None):
    """[(path, line, name)] of the repository. places: {(file, symbol): name}, to know the anchors of the keys of configs."""
    root, places, found = Path(root or results.ROOT), dict(places), []
    for path in documents.files(root):
        if NOT_SCANNED.match(path):
            continue
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [(path, line, name) for line, name in cited_names(text)]
        if path == "yardstick/deepspeed_config.json":
            found += [(path, number, places[match.groups()]) for number, line in enumerate(text.splitlines(), 1)
                      for match in READER.finditer(line) if match.groups() in places]
    return found


def enclosing_citations(path, text, line):
    """(names cited on a line, names cited around it): by the innermost statement of a program, indented block of a config, or
    section of a document that holds the line and cites anything else."""
    every = cited_names(text)
    here = [name for number, name in every if number == line]
    for first, last in sorted(_blocks(path, text), key=lambda block: block[1] - block[0]):
        around = [name for number, name in every if first <= number <= last and name not in here]
        if first <= line <= last and around:
            return here, list(dict.fromkeys(around))
    return here, []


def _blocks(path, text):
    """[(first line, last line)]"""
    lines = text.splitlines()
    if path.endswith(".py"):
        return [(node.lineno, node.end_lineno) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    if path.endswith(".md"):
        starts = [1, *(number for number, line in enumerate(lines, 1) if line.startswith("#")), len(lines) + 1]
        return [(first, after - 1) for first, after in zip(starts, starts[1:])]
    depth = [len(line) - len(line.lstrip()) for line in lines]
    return [(number, next((n for n in range(number, len(lines)) if lines[n].strip() and depth[n] <= depth[number - 1]),
                          len(lines))) for number in range(1, len(lines) + 1)]
