"""A DeepSpeed config with its explanations as notes beside its keys, in the file itself: `//` comments, which DeepSpeed reads.

Notes begin in one column. All of them follow from the keys (deepspeed_explain.py), and `annotate` writes them anew, apart from those
that begin with a word of OWN: these are the author's and stay. Other comments below the first brace go.
"""

import json
import re
import textwrap

from yardstick import deepspeed_config, deepspeed_explain, results

OWN = ("upstream", "here")         # what a note of the author's begins with, before a colon
COLUMN, WIDTH = 50, 120            # where notes begin (from 0), and the last column


def annotate(path):
    """The text of a config file with its notes written anew; the comment before the first brace and the author's notes stay."""
    config, text = deepspeed_config.parse(path)
    own, places, found, lines = own_notes(text, config), deepspeed_config.places_of(text, config), deepspeed_explain.by_key(config, {})[0], ["{"]

    def token(key, value):                                   # a number as its author wrote it
        number = re.compile(r"\s*(-?\d[\d.eE+-]*)").match(text, places.get(key, len(text)))
        spelled = number and isinstance(value, (int, float)) and not isinstance(value, bool)
        return number[1] if spelled else json.dumps(value, ensure_ascii=False)

    def write(section, prefix, indent):
        for number, (name, value) in enumerate(section.items(), 1):
            key, comma = prefix + name, "," * (number < len(section))
            notes = _notes(key, config) + [f"{finding.level}: {finding.message}" for finding in found.get(key, ())]
            notes += [f"{word}: {note}" for word, note in own.get(key, ())]
            opens = isinstance(value, dict) and value
            lines.extend(_beside(f"{indent}{json.dumps(name)}: " + ("{" if opens else token(key, value) + comma), notes))
            if opens:
                write(value, key + ".", indent + "  ")
                lines.append(f"{indent}}}{comma}")
    write(config, "", "  ")
    head = re.match(r"(?:[ \t]*(?:(?://|#)[^\n]*)?\n)*", text)[0]
    return head + "\n".join([*lines, "}", ""])


def _notes(key, config):
    if deepspeed_config.entry(key, config) is None:
        return []
    anchor, file, symbol, _ = deepspeed_explain.reader(key, config)
    read = f"ds:{anchor}" if anchor else f"{file}: {symbol}{deepspeed_explain.below(file)}" if file else symbol
    used = ", ".join(f"ds:{name}" for name, _ in deepspeed_explain.users(key, config) if name != anchor)
    return [*deepspeed_explain.facts(key, config), f"read: {read}" + (f"; used: {used}" if used else "")]


def _beside(code, notes):
    """Lines of a file: `code` with the notes to its right, or below where it is too long."""
    right = [line for note in notes for line in textwrap.wrap(note, WIDTH - COLUMN - 3, subsequent_indent="  ", break_on_hyphens=False)]
    left = [code] if len(code) < COLUMN else [code, ""]
    right = right if len(code) < COLUMN else ["", *right]
    for number in range(max(len(left), len(right))):
        code = left[number] if number < len(left) else ""
        note = right[number] if number < len(right) else ""
        yield f"{code:<{COLUMN}}// {note}" if note else code


def own_notes(text, config):
    """{dotted key: [(word, note)]} of the author's notes in a file: those that begin with a word of OWN; a note goes on in lines
    that are indented after their //."""
    key_at = {line: key for key, line in deepspeed_config.lines_of(text, config).items()}
    found, key, going_on = {}, None, False
    for number, line in enumerate(text.splitlines(), 1):
        key = key_at.get(number, key)
        place = re.sub(r'"(?:[^"\\]|\\.)*"', lambda text: "_" * len(text[0]), line).find("//")
        comment = line[place + 2:] if place >= 0 else ""
        word, colon, note = comment.strip().partition(": ")
        if comment.startswith("   ") and going_on:
            word, note = found[key][-1]
            found[key][-1] = (word, f"{note} {comment.strip()}")
        elif going_on := bool(colon and word in OWN and key):
            found.setdefault(key, []).append((word, note))
    return found


def beside_upstream(path):
    """Markdown: a table of the keys of an annotated file that upstream gives otherwise, or lacks, where its author says why; then
    the others that upstream lacks."""
    config, text = deepspeed_config.parse(results.ROOT / path)
    rows, rest = [], []
    for key, notes in own_notes(text, config).items():
        value, said = deepspeed_explain.value_of(config, key), dict(notes)
        theirs, _, why = said.get("upstream", "").partition("; ")
        why = "; ".join(filter(None, (why, said.get("here"))))
        if why and not isinstance(value, dict):
            rows.append(f"| `{key}` | `{json.dumps(value)}` | {theirs if theirs == 'absent' else f'`{theirs}`'} | {why} |")
        elif theirs == "absent" and not isinstance(value, dict):
            rest.append(f"`{key}`")
    return "\n".join(["| key | here | upstream | why |", "|---|---|---|---|", *rows, "", f"Absent upstream, too: {', '.join(rest)}."])
