"""Where text comes from: the standard library of Python, a file, a folder, or a hub data set, as streams.

`yardstick.data` tokenizes what this file reads. A stream is a function that begins it anew each time: it gives
strings, and the string END behind each document.
"""

import contextlib
import hashlib
import json
import sysconfig
from pathlib import Path
from typing import Callable, NamedTuple

REFERENCE = Path(__file__).with_suffix(".json")     # modules of the embedded text; its SHA-256 in one Python
END = "<|endoftext|>"
PIECE = 1 << 17                                     # characters of a string of a stream, about


class Source(NamedTuple):
    name: str
    stream: Callable
    size: int | None            # bytes, where that is known beforehand
    note: str | None            # what was left out


def open_source(source):
    """The Source of "embedded", the path of a text file or folder, or "hub:NAME[:config][:split]"."""
    if source == "embedded":
        return _standard_library()
    if source.startswith("hub:"):
        return _hub(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise ValueError(f"data={source} does not exist. Give the path of a text file or of a folder of them, "
                         "hub:NAME for a hub data set, or embedded.")
    next(pieces(path))                              # raises at once for what is no text
    return _files(path.name, path.parent, [path])


def pieces(path):
    """The text of a UTF-8 file in strings cut behind a newline, or before a space, or anywhere.

    Raises ValueError for a file that is binary, in another encoding, empty or unreadable.
    """
    rest, empty = "", True
    try:
        with open(path, encoding="utf-8-sig") as file:      # drops the byte order mark that some editors write
            while block := file.read(PIECE):
                if "\0" in block:
                    raise ValueError(f"{path} is a binary file: it has zero bytes. Give UTF-8 text.")
                rest, empty = rest + block, False
                cut = rest.rfind("\n") + 1 or max(rest.rfind(" "), 0) or len(rest)
                yield rest[:cut]
                rest = rest[cut:]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason}). "
                         "Convert it, for example with iconv -f latin1 -t utf-8.") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}). Check the path and its permissions.") from None
    if empty:
        raise ValueError(f"{path} is empty. Give a file with text.")
    if rest:
        yield rest


def _files(name, base, paths, note=None):
    """Files as documents, ordered by a hash of their names, so that the tail is a sample of them all."""
    paths = sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(base).as_posix().encode()).digest())

    def stream():
        for path in paths:
            yield from pieces(path)
            yield END
    return Source(name, stream, sum(path.stat().st_size for path in paths), note)


def _folder(base):
    def is_text(path):
        with contextlib.suppress(ValueError):
            return bool(next(pieces(path)))

    found = [path for path in base.rglob("*") if path.is_file()
             and not any(part.startswith(".") for part in path.relative_to(base).parts)]
    paths = [path for path in found if is_text(path)]
    if not paths:
        raise ValueError(f"folder {base} has no UTF-8 text file. Give one that has, or convert with iconv.")
    left_out = len(found) - len(paths)
    return _files(base.resolve().name, base, paths,
                  f"{left_out} files that are empty or no UTF-8 text are left out" if left_out else None)


def _standard_library():
    """The modules of data_sources.json; a package counts with all its files but its tests."""
    base, paths, missing = Path(sysconfig.get_paths()["stdlib"]), [], []
    for module in json.loads(REFERENCE.read_text())["modules"]:
        path = base.joinpath(*module.split("."))
        file = path.with_suffix(".py")
        found = [file] if file.is_file() else [
            p for p in path.rglob("*.py") if not {"test", "tests"} & set(p.relative_to(base).parts)]
        paths += [p for p in found if p.stat().st_size]
        missing += [] if found else [module]
    if not paths:
        raise ValueError(f"the standard library of this Python ({base}) has no .py sources: it is zipped or "
                         "stripped. Use a Python with sources, or give data=FILE or data=FOLDER.")
    return _files("embedded", base, paths, f"missing modules: {', '.join(missing)}" if missing else None)


def _hub(source):
    name, config, split, *_ = source.removeprefix("hub:").split(":") + ["", ""]
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data={source} needs the library datasets, which is not installed. Run pip install "
                         "datasets, or give the path of a text file or folder.") from None
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:      # the library raises a dozen kinds, its own and those of the network
        raise ValueError(f"cannot load data={source} ({type(error).__name__}: {error}). Check name, config, split "
                         "and network; HF_HOME is the folder of what was downloaded before.") from error
    if "text" not in rows.column_names:
        raise ValueError(f"data={source} has no column \"text\" but {', '.join(rows.column_names)}. "
                         "Write the one you want into a text file, and give its path.")

    def stream():
        for row in rows:
            if row["text"]:
                yield row["text"]
                yield END
    return Source(source, stream, None, None)
