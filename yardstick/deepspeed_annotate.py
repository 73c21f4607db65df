"""A DeepSpeed config with its explanations as notes beside its keys, in the file itself: `//` comments, which DeepSpeed reads.

Notes begin in one column. All of them follow from the keys (deepspeed_explain.py), and `annotate` writes them anew, apart from those
that begin with a word of OWN: these are the author's and stay. Other comments below the first brace have no place in what
`annotate` returns, and `write` refuses a file that has one.
"""

import json
import re
import stat
import textwrap
from pathlib import Path

from yardstick import deepspeed_config, deepspeed_explain, results

OWN = ("upstream", "here")         # what a note of the author's begins with, before a colon
COLUMN, WIDTH = 50, 120            # where notes begin (from 0), and the last column
LIMITS = re.compile(r"// (unit [^;]+; )?default .+; range ")        # these two: notes of annotate's, all but the first of a key
WRITTEN = re.compile(LIMITS.pattern + "|// (cost|with|read|warning|error): ")
HEAD = re.compile(r"(?:[ \t]*(?:(?://|#)[^\n]*)?\n)*")                                              # what stands before the first brace
NUMBER = re.compile(r"\s*(-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)(?![\w.+-])")
COMMENT = re.compile(r"""'{3}.*?'{3}|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'             # a text, with quotation marks
                         |:[ \t]*(?!(?:true|false|null)\b)[A-Za-z.][^\n]*                  # or without, to the end of the line
                         |(?P<comment>//[^\n]*|\#[^\n]*|/\*.*?\*/)""", re.DOTALL | re.VERBOSE)


def annotate(path):
    """The text of a config file with its notes written anew; the comment before the first brace and the author's notes stay.

    Raises ValueError for a config that the new text would not hold as it is.
    """
    config, text = deepspeed_config.parse(path)
    own, places, found, lines = own_notes(text, config), deepspeed_config.places_of(text, config), deepspeed_explain.by_key(config, {})[0], ["{"]

    def token(key, value):                                   # a number as its author wrote it
        number, plain = NUMBER.match(text, places.get(key, len(text))), json.dumps(value, ensure_ascii=False)
        same = number and isinstance(value, (int, float)) and not isinstance(value, bool) and json.loads(number[1]) == value
        return number[1] if same else plain

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
    annotated = HEAD.match(text)[0] + "\n".join([*lines, "}", ""])
    try:
        same = json.dumps(deepspeed_config.parsed(annotated, path)) == json.dumps(config)
    except ValueError:
        same = False
    if not same:
        raise ValueError(f"{path} cannot be annotated: with its notes it would read as another config. Write it as plain JSON.")
    return annotated


def write(path):
    """Annotate a file in place; a link stays a link, and the mode stays. Raises ValueError where a comment would go, too."""
    annotated, file, (config, text) = annotate(path), Path(path).resolve(), deepspeed_config.parse(path)
    if gone := _sort(text, config)[1]:
        line, comment = gone[0]
        raise ValueError(f'{path}:{line}: this comment would go: "{comment}". Begin it with here: to keep it, as // here: ... beside or '
                         "below a key, or delete it.")
    mode = file.stat().st_mode
    if not mode & stat.S_IWUSR:
        raise ValueError(f"{path} is read-only. Leave --write out, or allow writing it: chmod u+w.")
    try:
        results.replace_file(file, annotated)
        file.chmod(stat.S_IMODE(mode))
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}). Leave --write out, or give a copy.") from None


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
    return _sort(text, config)[0]


def _sort(text, config):
    """(author's notes by key, [(line, comment)] of what is neither the author's nor of annotate's making)."""
    key_at = {line: key for key, line in deepspeed_config.lines_of(text, config).items()}
    notes = []                                               # [line, last line, column, text, with all lines of it]
    for match in COMMENT.finditer(text, HEAD.match(text).end()):
        if comment := match["comment"]:
            line, column = text.count("\n", 0, match.start()) + 1, match.start() - text.rfind("\n", 0, match.start()) - 1
            last = notes[-1] if notes else (0, 0, 0, "")
            beside = column == last[2] or last[3][3:].startswith(tuple(f"{word}: " for word in OWN))
            if comment.startswith("//   ") and last[1] == line - 1 and beside and line not in key_at:
                notes[-1][1], notes[-1][3] = line, f"{notes[-1][3]} {comment[2:].strip()}"
            else:
                notes.append([line, line, column, " ".join(comment.split())])
    own, gone, starts = {}, [], [max((at for at in key_at if at <= line), default=None) for line, *_ in notes]
    limited = {start for start, (*_, comment) in zip(starts, notes) if LIMITS.match(comment)}
    for number, (start, (line, _, column, comment)) in enumerate(zip(starts, notes)):
        word, colon, note = comment[2:].strip().partition(": ")
        first = start in limited and starts.index(start) == number and line - start <= 1         # what the key means
        if comment.startswith("//") and colon and word in OWN and start:
            own.setdefault(key_at[start], []).append((word, note))
        elif column != COLUMN or not start or not (first or WRITTEN.match(comment)):
            gone.append((line, comment))
    return own, gone


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
