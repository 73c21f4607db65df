"""Proves the notes of an annotated script: runs it under a call tracer and looks whether each cited symbol was entered.

    python -m yardstick.deepspeed_proof annotated_scripts/01_hello_deepspeed_annotated.py      # exit status 1 where one is not
    python -m yardstick.deepspeed_proof record=cpu2                                            # all of them, kept in results/
    python -m yardstick.deepspeed_proof table=cpu2                                             # the kept results, as a table

A script says in its docstring with which settings it is run, one run on a line:

    Proof:
        stage=2 steps=2
        stage=3 steps=2 offload=True

A note `#| ... ds:GROUP.NAME` says that the statement beside it enters that symbol, itself or through what it calls; it counts
as traced where the tracer saw that in one of the runs, on any rank. `ds:GROUP.NAME (read: REASON)` says that no tracer can
see it (C++, another process, a class of settings, a branch that this device does not take), and why.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from yardstick import results
from yardstick.deepspeed_citations import CITATION
from yardstick.deepspeed_map import ANCHORS
from yardstick.deepspeed_source import Package
from yardstick.settings import Either, SettingsError, nearest, override, usage

FOLDER = results.ROOT / "annotated_scripts"
CONFIG = {
    "record": Either(str),           # LABEL: keep the result of every script under results/LABEL/annotated_scripts
    "table": Either(str),            # LABEL: print the kept results as a table, and run nothing
}
UPSTREAM = re.compile(r"(https://github\.com/deepspeedai/DeepSpeedExamples/(?:blob|tree)/([0-9a-f]{7,40})/(\S+))")
READ = re.compile(r" \(read: ([^)]+)\)")
SECONDS = 900                      # of one run


@dataclass(frozen=True)
class Cited:
    """A citation in a script: the statement it stands beside is lines first to last; read: why it is not traced, or ""."""

    line: int
    name: str
    read: str
    first: int
    last: int


def cited(text):
    """[Cited] of a script's notes, in their order.

    >>> [(one.name, one.read, one.first, one.last) for one in cited('f(1,   #| runs ds:a.b\\n  2)\\n       #| ds:c.d (read: C++)')]
    [('a.b', '', 1, 2), ('c.d', 'C++', 1, 2)]
    """
    spans, found, lines = statements(text), [], text.splitlines()
    for number, line in enumerate(lines, 1):
        code, bar, note = line.partition("#|")
        if not bar:
            continue
        beside = number
        while beside > 1 and not lines[beside - 1].partition("#|")[0].strip():    # a note of several lines: the code above it
            beside -= 1
        holding = [span for span in spans if span[0] <= beside <= span[1]]
        first, last = min(holding, key=lambda span: span[1] - span[0], default=(beside, beside))
        for match in CITATION.finditer(note):
            reason = READ.match(note[match.end():])
            found.append(Cited(number, match[1], reason[1] if reason else "", first, last))
    return found


def statements(text):
    """[(first, last line)] of each simple statement, and of the header of each compound one."""
    spans = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            header = node.lineno if not body else max(node.lineno, body[0].lineno - 1)
            spans.append((node.lineno, header if body else node.end_lineno))
    return spans


def runs(text):
    """[[argument]] of the Proof paragraph of a script's docstring."""
    wanted = re.search(r"^Proof:\n((?:    .*\n?)+)", ast.get_docstring(ast.parse(text)) or "", re.MULTILINE)
    return [line.split() for line in wanted[1].splitlines()] if wanted else []


def entered(script, settings):
    """Run a script under the tracer -> {"FILE:SYMBOL": {lines of the script}} of all ranks, and the record it wrote or None.

    Raises RuntimeError where it fails.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("RANKS", "RUN_STAMP", "TURN")}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, str(script), *settings, f"output={folder}/run"], capture_output=True, text=True,
                              timeout=SECONDS, env={**environment, "CALL_TRACE": folder, "DS_ACCELERATOR": "cpu"})
        if done.returncode:
            raise RuntimeError(f"{script} {' '.join(settings)} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}"
                               f"{done.stderr[-4000:]}")
        found = {}
        if not list(Path(folder).glob("*.json")):
            raise RuntimeError(f"{script} left no trace: only programs that end in yardstick.program.main can be proved.")
        for path in Path(folder).glob("*.json"):
            for symbol, lines in json.loads(path.read_text()).items():
                found.setdefault(symbol, set()).update(lines)
        record = Path(folder, "run", "record.json")
        return found, json.loads(record.read_text()) if record.is_file() else None


def verdict(one, seen):
    """"traced", "read", or "" for a citation that is neither. seen: what `entered` found in all runs."""
    if one.read:
        return "read"
    anchor = ANCHORS[one.name]
    place = f"{anchor['file']}:{anchor['symbol']}"                   # of a class any method counts
    lines = set().union(*(lines for symbol, lines in seen.items() if symbol == place or symbol.startswith(place + ".")))
    return "traced" if any(one.first <= line <= one.last for line in lines) else ""


def prove(script):
    """Run every proof run of a script -> [(Cited, verdict)], {"FILE:SYMBOL": {lines}}, [record of each run].

    Raises ValueError for an unknown anchor, RuntimeError for a run that fails.
    """
    text = Path(script).read_text(encoding="utf-8")
    notes = cited(text)
    for one in notes:
        if one.name not in ANCHORS:
            raise ValueError(f"{script}:{one.line}: there is no anchor {one.name}. Did you mean {nearest(one.name, ANCHORS)}?")
    if not runs(text):
        raise ValueError(f"{script}: its docstring has no paragraph 'Proof:' with the settings to run it with.")
    seen, records = {}, []
    for settings in runs(text):
        found, record = entered(script, settings)
        records.append(record)
        for symbol, lines in found.items():
            seen.setdefault(symbol, set()).update(lines)
    return [(one, verdict(one, seen)) for one in notes], seen, records


def report(script, label=None):
    """Prove one script, print its citations, keep the record where a label is given -> how many are neither traced nor read."""
    notes, seen, records = prove(script)
    for one, state in notes:
        print(f"{Path(script).name}:{one.line:<4} {state or 'NOT ENTERED':<12} ds:{one.name}" + (f"  ({one.read})" if one.read else ""))
    count = {state: sum(each == state for _, each in notes) for state in ("traced", "read", "")}
    print(f"{Path(script).name}: {count['traced']} traced, {count['read']} read, {count['']} not entered")
    if label:
        known = {f"{anchor['file']}:{anchor['symbol']}" for anchor in ANCHORS.values()}
        results.write(f"annotated_scripts/proof_{Path(script).stem}", label=label, machine={"accelerator": "none", "ranks": records[0]["machine"]["ranks"] if records[0] else 1},
                      command=f"python -m yardstick.deepspeed_proof record={label}", predicted={},
                      settings={"runs": [" ".join(run) for run in runs(Path(script).read_text())]},
                      measured={"citations_count": len(notes), "traced_count": count["traced"], "read_count": count["read"]},
                      details={"entered": sorted(known & set(seen))})
    return count[""]


def table(label):
    """Markdown: of each script its subject, its upstream, and its citations by the records of results/LABEL."""
    lines = ["| script | upstream, at commit | lines | citations | traced | read |", "|---|---|---|---|---|---|"]
    for script in sorted(FOLDER.glob("0*_annotated.py")):
        text = script.read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(text))
        link, commit, path = UPSTREAM.search(docstring).groups()
        measured = results.read(f"annotated_scripts/proof_{script.stem}", label)["measured"]
        lines.append(f"| [{script.stem.removesuffix('_annotated')}]({script.name}): {docstring.splitlines()[0]} | [{path}]({link}), {commit[:7]} | "
                     f"{len(text.splitlines())} | " + " | ".join(str(measured[f"{key}_count"]) for key in ("citations", "traced", "read")) + " |")
    return "\n".join(lines)


def main(arguments):
    if text := usage(arguments, __file__):
        print(text)
        return 0
    files = [argument for argument in arguments if argument.endswith(".py")]
    settings = override(CONFIG, [argument for argument in arguments if argument not in files], "yardstick.deepspeed_proof")
    results.check_label(settings["record"])
    results.check_label(settings["table"])
    if settings["table"]:
        print(table(settings["table"]))
        return 0
    Package.at()
    files = files or sorted(FOLDER.glob("0*_annotated.py"))
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"there is no file {file}.")
    return 1 if sum([report(file, settings["record"]) for file in files]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, SettingsError, ValueError, RuntimeError, SyntaxError, subprocess.TimeoutExpired) as error:
        sys.exit(f"yardstick.deepspeed_proof: {error}")
