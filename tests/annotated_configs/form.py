"""What an annotated config looks like: keys on the left, on the right a note with the parts that a reader can count on."""

import json
import re

from yardstick import deepspeed_config, deepspeed_explain
from yardstick.deepspeed_annotate import COLUMN, WIDTH
from yardstick.results import ROOT

FILES = sorted((ROOT / "annotated_configs").glob("*_annotated.json"))
PARTS = ("cost", "with", "read", "upstream", "here", "warning", "error")


def notes(path):
    """{dotted key: {"says": ..., "unit": ..., "default": ..., "range": ..., and PARTS}} of a file's notes, read from its text alone."""
    config, text = deepspeed_config.parse(path)
    first = {line: key for key, line in deepspeed_config.lines_of(text, config).items()}
    found, key = {}, None
    for number, line in enumerate(text.splitlines(), 1):
        key = first.get(number, key)
        if key is None or line[COLUMN:COLUMN + 3] != "// ":
            continue
        note = line[COLUMN + 3:]
        items = found.setdefault(key, [])
        if note.startswith("  "):
            items[-1] += " " + note.strip()
        else:
            items.append(note)
    return {key: dict(_part(number, item) for number, item in enumerate(items)) | _limits(items) for key, items in found.items()}


def _part(number, item):
    word, colon, rest = item.partition(": ")
    return (word, rest) if colon and word in PARTS else ("says" if number == 0 else "limits", item)


def _limits(items):
    match = re.fullmatch(r"(?:unit (?P<unit>[^;]+); )?default (?P<default>[^;]+); range (?P<range>.+)", items[1]) if items[1:] else None
    return {name: value for name, value in match.groupdict().items() if value} if match else {}


def upstream(path):
    """Upstream's config as the notes tell it."""
    config = {}
    for key, note in notes(path).items():
        value = note["upstream"].partition("; ")[0]
        if value in ("absent", "the section"):
            continue
        section, *names = config, *key.split(".")
        for name in names[:-1]:
            section = section.setdefault(name, {})
        section[names[-1]] = json.loads(value)
    return config


def column_errors(path, text):
    """Code ends before the notes' column, notes begin in it, no line is too long; the comment before the first brace is free."""
    errors, lines = [], text.splitlines()
    for number, line in enumerate(lines, 1):
        if len(line) > WIDTH:
            errors.append(f"{path}:{number}: {len(line)} columns, more than {WIDTH}")
        if number <= lines.index("{"):
            continue
        place = re.sub(r'"(?:[^"\\]|\\.)*"', lambda text: "_" * len(text[0]), line).find("//")
        if place >= 0 and place != COLUMN:
            errors.append(f"{path}:{number}: its note begins in column {place + 1}, not in {COLUMN + 1}")
        if place < 0 and len(line) > COLUMN:
            errors.append(f"{path}:{number}: its code ends in column {len(line)}, after {COLUMN}")
        if place < 0 and not re.fullmatch(r" *[{}],?", line):
            errors.append(f"{path}:{number}: a key without a note")
    return errors


def part_errors(path):
    """Each key has meaning, default and range, cost, what it acts with, the anchor that reads it, and upstream's value; numbers have a unit."""
    config, found, errors = deepspeed_config.read(path), notes(path), []
    for key, _, value, _ in deepspeed_explain.walk(config):
        needed = {"says", "default", "range", "cost", "with", "read", "upstream"}
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        needed |= {"unit"} if number and deepspeed_config.entry(key, config).get("choices") is None else set()
        errors += [f"{path.name}: {key} has no {part}" for part in sorted(needed - set(found.get(key, ())))]
        if value == "auto":
            errors.append(f"{path.name}: {key} is no number but \"auto\"")
    return errors
