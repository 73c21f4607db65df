"""Anchors: short names for places in DeepSpeed, checked against the installed one; what cites them, and what drifts.

    python -m yardstick.deepspeed_map check [--package DIR]      # exit status 1 where an anchor moved, changed or is gone
    python -m yardstick.deepspeed_map show NAME [--package DIR]  # its lines in your installation, our note, what cites it
    python -m yardstick.deepspeed_map show zero3                 # a table of one group; without a name, of all
    python -m yardstick.deepspeed_map where FILE:LINE            # of this repository, or of DeepSpeed (a traceback's)
    python -m yardstick.deepspeed_map drift DIR [--package DIR] [--record LABEL]      # another release against yours
    python -m yardstick.deepspeed_map accept NAME ...            # after you have read what changed, and its note

An anchor (deepspeed_map.json, one on a line) is a file and a symbol of the package deepspeed, a landmark, which is an
expression inside it that the note is about, the digest of its code in the release that the notes describe, and the note.
A document, a script or a config cites it as ds:GROUP.NAME, for example ds:zero3.step (deepspeed_citations.py). Symbols are
found by reading the source (deepspeed_source.py); DeepSpeed is not imported.
"""

import argparse
import json
import re
import signal
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from yardstick import results
from yardstick.deepspeed_citations import citations, enclosing_citations
from yardstick.deepspeed_source import Package
from yardstick.settings import nearest

FILE = Path(__file__).with_suffix(".json")
MAP = json.loads(FILE.read_text(encoding="utf-8"))
ANCHORS, REASONS, RELEASE = MAP["anchors"], MAP["reasons"], MAP["deepspeed"]

STATES = ("verified", "moved", "changed", "gone")
WHOLE = 70                                                          # lines of a symbol that show prints without gaps


@dataclass(frozen=True)
class Found:
    """An anchor in a package. file, symbol: its place there, None where it is gone; detail: what differs, in words."""

    name: str
    state: str
    file: str | None
    symbol: str | None
    detail: str = ""


def look(name, package):
    """Where an anchor is in a package, and whether its code is what the note was written for -> Found."""
    anchor = ANCHORS[name]
    file, symbol = anchor["file"], anchor["symbol"]
    if package.find(file, symbol) is not None:
        if package.digest(file, symbol) == anchor["code"]:
            return Found(name, "verified", file, symbol)
        return Found(name, "changed", file, symbol, "its code differs; " + _landmark(anchor, package, file, symbol))
    former = [tuple(place.split(":")) for place in anchor.get("former", ())]
    place = next((place for place in former if package.find(*place) is not None), None)
    if place is None:
        place = package.elsewhere(file, symbol, anchor["code"])
    if place is None:
        return Found(name, "gone", None, None, "no such symbol" + ("" if package.text(file) else ", and no such file"))
    same = package.digest(*place) == anchor["code"]
    return Found(name, "moved", *place, f"it is {place[0]}: {place[1]}, "
                 + ("with the same code" if same else "its code differs; " + _landmark(anchor, package, *place)))


def _landmark(anchor, package, file, symbol):
    there = bool(package.landmarks(file, symbol, anchor["landmark"]))
    return f"its landmark {anchor['landmark']} is {'still inside' if there else 'no longer inside'}"


def look_all(package):
    return [look(name, package) for name in ANCHORS]


# Commands

def check(package):
    found = look_all(package)
    print(f"DeepSpeed {package.version}; the notes describe {RELEASE}")
    for one in found:
        if one.state != "verified":
            anchor = ANCHORS[one.name]
            print(f"{one.state}: {one.name}: {anchor['file']}: {anchor['symbol']}: {one.detail}")
    verified = sum(one.state == "verified" for one in found)
    print(f"{verified} anchors verified, {len(found) - verified} not")
    return 0 if verified == len(found) else 1


def show(name, package):
    if name in (None, *groups()):
        print(table([each for each in ANCHORS if name in (None, each.split(".")[0])]))
        return 0
    name = _known(name)
    anchor, found = ANCHORS[name], look(name, package)
    print(f"ds:{name}\n\n" + textwrap.fill(anchor["says"], 100) + "\n")
    if found.file is None:
        print(f"gone: DeepSpeed {package.version} has no {anchor['file']}: {anchor['symbol']}")
    else:
        print(f"{found.state} in DeepSpeed {package.version}" + (f": {found.detail}" if found.detail else ""))
        _print_source(found, anchor, package)
    if "read" in anchor:
        print(f"\nnot traced: {REASONS[anchor['read']]}")
    cited = [(path, line) for path, line, each in citations(places()) if each == name]
    print("\ncited by " + (", ".join(f"{path}:{line}" for path, line in cited) or "nothing"))
    return 0


def _print_source(found, anchor, package):
    first, last = package.lines(found.file, found.symbol)
    source = package.text(found.file).splitlines()
    marks = package.landmarks(found.file, found.symbol, anchor["landmark"])
    print(f"{package.folder / found.file}:{first}\n{found.symbol}, lines {first} to {last}\n")
    shown = set(range(first, last + 1))
    if len(shown) > WHOLE:                                   # its beginning, and what stands around the landmark
        shown = {n for n in shown if n < first + 12 or any(-6 <= n - mark <= 6 for mark in marks)}
    before = first - 1
    for number in sorted(shown):
        if number != before + 1:
            print("      ...")
        print(f"{number:>6}{'*' if number in marks else ' '} {source[number - 1]}".rstrip())
        before = number
    if before != last:
        print("      ...")


def where(place, package):
    file, _, line = place.rpartition(":")
    if not file or not line.isdecimal():
        raise ValueError(f"{place!r} is no FILE:LINE. Write README.md:10, for example.")
    line, path = int(line), Path(file)
    if not path.is_file():
        inside = file.split("deepspeed/")[-1]
        if package.text(inside):
            return _where_in_deepspeed(inside, line, package)
        raise ValueError(f"there is no file {file}, here or in the package deepspeed.")
    if path.resolve().is_relative_to(package.folder.resolve()):
        return _where_in_deepspeed(path.resolve().relative_to(package.folder.resolve()).as_posix(), line, package)
    text = path.read_text(encoding="utf-8")
    if not 1 <= line <= len(text.splitlines()):
        raise ValueError(f"{file} has {len(text.splitlines())} lines; there is no line {line}.")
    here, around = enclosing_citations(file, text, line)
    for title, names in ((f"{file}:{line} cites", here), ("around it", around)):
        if names:
            print(f"{title}:")
            for name in names:
                found = look(_known(name), package)
                span = "gone" if found.file is None else "{}:{}-{}".format(found.file, *package.lines(found.file, found.symbol))
                print(f"  ds:{name}  {span}  {found.symbol or ''}")
                print(textwrap.fill(ANCHORS[name]["says"], 100, initial_indent="    ", subsequent_indent="    "))
    if not here and not around:
        print(f"nothing at {file}:{line}, or around it, cites an anchor")
    return 0


def _where_in_deepspeed(file, line, package):
    names = {(found.file, found.symbol): found.name for found in look_all(package) if found.file == file}
    holding = package.enclosing(file, line)
    for symbol in holding:
        if (file, symbol) in names:
            print(f"{file}:{line} is in {symbol}:")
            return show(names[file, symbol], package)
    print(f"no anchor holds {file}:{line}" + (f", which is in {holding[0]}" if holding else ""))
    return 0


def drift(folder, package, label=None):
    """Report how the anchors fare in another release; with a label, keep it as results/LABEL/deepspeed_map/drift_VERSION."""
    other = Package.at(folder)
    found, same_lines, shifts = look_all(other), 0, []
    for one in found:
        here = look(one.name, package)
        if one.file is not None and here.file is not None:
            first = other.lines(one.file, one.symbol)[0] - package.lines(here.file, here.symbol)[0]
            shifts.append(abs(first))
            same_lines += not first
    counts = Counter(one.state for one in found)
    lost = sum("no longer inside" in one.detail for one in found)
    print(f"DeepSpeed {other.version} against {package.version}; the notes describe {RELEASE}")
    for one in found:
        if one.state != "verified":
            print(f"{one.state}: {one.name}: {ANCHORS[one.name]['file']}: {ANCHORS[one.name]['symbol']}: {one.detail}")
    middle = sorted(shifts)[len(shifts) // 2] if shifts else 0
    print(f"{other.version}: " + ", ".join(f"{counts[state]} {state}" for state in STATES)
          + f"; {lost} without their landmark; {same_lines} begin on the same line, the median has moved by {middle} lines")
    if label:
        path = results.write(
            f"deepspeed_map/drift_{other.version}", label=label, machine={"accelerator": "none", "ranks": 1},
            command=f"python -m yardstick.deepspeed_map drift DIR --record {label}", predicted={},
            settings={"release": other.version, "against": package.version, "notes": RELEASE},
            measured={**{f"{state}_count": counts[state] for state in STATES}, "without_landmark_count": lost,
                      "same_first_line_count": same_lines, "anchors_count": len(found)},
            details={"median_shift_lines": middle, **{state: {one.name: one.detail for one in found if one.state == state}
                                                      for state in STATES if state != "verified"}})
        print(f"kept as {path.relative_to(results.ROOT)}")
    return 0


def accept(names, package):
    """Take the code of the installed release as what the notes of these anchors describe: rewrites their digests."""
    text = FILE.read_text(encoding="utf-8")
    for name in map(_known, names):
        anchor = ANCHORS[name]
        file, symbol = anchor["file"], anchor["symbol"]
        if package.find(file, symbol) is None or not package.landmarks(file, symbol, anchor["landmark"]):
            raise ValueError(f"{name}: {file}: {symbol} with {anchor['landmark']} in it is not in DeepSpeed {package.version}. "
                             f"Correct its line of {FILE.name} first.")
        line = re.compile(rf'(^ *"{re.escape(name)}": .*"code": ")[0-9a-f]*(")', re.MULTILINE)
        text = line.sub(lambda match: match[1] + package.digest(file, symbol) + match[2], text)
    results.replace_file(FILE, text)
    print(f"accepted {', '.join(names)} as of DeepSpeed {package.version}")
    return 0


def places():
    """{(file, symbol): name of its anchor}."""
    return {(anchor["file"], anchor["symbol"]): name for name, anchor in ANCHORS.items()}


def groups():
    return list(dict.fromkeys(name.split(".")[0] for name in ANCHORS))


def table(names):
    """A Markdown table of anchors: name, place, note."""
    rows = [f"| `ds:{name}` | `{ANCHORS[name]['file']}: {ANCHORS[name]['symbol']}` | {ANCHORS[name]['says']} |" for name in names]
    return "\n".join(["| anchor | in DeepSpeed | what it does |", "|---|---|---|", *rows])


def _known(name):
    name = name.removeprefix("ds:")
    if name not in ANCHORS:
        close = nearest(name, [*ANCHORS, *groups()])
        raise ValueError(f"there is no anchor {name!r}." + (f" Did you mean {close}?" if close else "")
                         + " python -m yardstick.deepspeed_map show lists them.")
    return name


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m yardstick.deepspeed_map", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, argument, options in (("check", None, {}), ("show", "name", {"nargs": "?"}), ("where", "place", {}),
                                    ("drift", "folder", {}), ("accept", "names", {"nargs": "+"})):
        command = commands.add_parser(name)
        command.add_argument("--package", metavar="DIR", help="a DeepSpeed other than that of this Python")
        if argument:
            command.add_argument(argument, **options)
        if name == "drift":
            command.add_argument("--record", metavar="LABEL", help="keep the report under results/LABEL")
    given = parser.parse_args(arguments)
    package = Package.at(given.package)
    if given.command == "check":
        return check(package)
    if given.command == "show":
        return show(given.name, package)
    if given.command == "where":
        return where(given.place, package)
    if given.command == "accept":
        return accept(given.names, package)
    results.check_label(given.record)
    return drift(given.folder, package, given.record)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)        # show | head
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, SyntaxError, ValueError) as error:
        sys.exit(f"yardstick.deepspeed_map: {error}")
