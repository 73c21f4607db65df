"""Records of runs: the only writer of results/*.json, and their reader.

    python -m yardstick.results list               # the records under results/
    python -m yardstick.results refresh [FILES]    # fills the generated blocks of the documents (documents.py)
    python -m yardstick.results check [FILES]      # exit status 1 when one of them is stale
"""

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy")

# A key of measured, predicted and estimated ends in its unit; which number of several it is may follow.
UNITS = ("bytes", "seconds", "per_second", "count", "parameters", "tokens", "steps", "flops", "nats",
         "fraction", "ratio", "norm")
STATISTICS = ("median", "mean", "min", "max", "first", "last", "total")
_UNIT = re.compile(rf"(?:.+_)?(?:{'|'.join(UNITS)})(?:_(?:{'|'.join(STATISTICS)}))?")


def write(run, *, outcome="ok", settings, measured, predicted, estimated=None, details=None, machine=None,
          versions=None, command=None, label=None, folder=None, root=None):
    """Write the record of one run and return its path.

    run: what ran, "strategies/3_zero_stage2". outcome: "ok", or what went wrong ("out of memory").
    measured, predicted, estimated: flat, {key: number}, the unit in the key (see UNITS); a quantity that is
    not known is a missing key. details: anything else that JSON can hold (loss curves, ledgers of each rank).
    machine: what the caller knows, accelerator and ranks at least; processor and memory are added.
    label: the file is results/label/run.json, for commits, and may then hold no path of this machine.
    Without it the file is record.json in `folder`, by default a new folder under runs/.
    """
    root = pathlib.Path(root or ROOT)
    _check_run(run)
    check_label(label)
    record = {"run": run, "outcome": outcome, "command": command or shown_command(root=root), **_git_state(root),
              "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
              "machine": {**({"label": label} if label else {}), **this_machine(), **(machine or {})},
              "versions": versions or installed_versions(), "settings": settings, "measured": measured,
              "predicted": predicted, "estimated": estimated or {}, "details": details or {}}
    record = _plain(record, f"{run}: ")
    for part in ("measured", "predicted", "estimated"):
        _check_numbers(part, record[part])
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    # a list of numbers, behind a word or not, stays on one line (JSON strings hold no line breaks, so only lists can match)
    text = re.sub(r'\[\n((?: *"\w{1,12}",\n)?[^\[\]{}"]*)\n *\]', lambda m: "[" + " ".join(m[1].split()) + "]", text) + "\n"
    if label:
        path = root / "results" / label / f"{run}.json"
        if found := _machine_path(record, text, root):
            raise ValueError(f"{path.relative_to(root)}: a committed record holds no path of a machine; "
                             f"this has {found.strip()[:200]}. Run with relative paths.")
    else:
        path = pathlib.Path(folder or run_folder(run, root)) / "record.json"
    replace_file(path, text)
    return path


def read(name, label=None, root=None):
    """One record: read("strategies/3_zero_stage2", "cpu2") from results/, read(FILE or FOLDER),
    or read("strategies/3_zero_stage2"), the newest run under runs/."""
    root = pathlib.Path(root or ROOT)
    path = pathlib.Path(name)
    if label is not None:
        path = root / "results" / label / f"{name}.json"
    elif path.is_dir() and (path / "record.json").exists():
        path = path / "record.json"
    elif path.suffix != ".json" and not path.is_absolute():
        path = max((root / "runs").glob(f"{path.as_posix()}/*/record.json"), default=path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        known = ", ".join(p.relative_to(root / "results").with_suffix("").as_posix() for p in _record_paths(root))
        raise FileNotFoundError(f"no record {_short(path, root)}. A run writes one; record=LABEL keeps it under "
                                f"results/LABEL. Kept so far: {known or 'none'}.") from None
    except ValueError as error:
        raise ValueError(f"{_short(path, root)} is no JSON ({error}). Run its program again.") from None
    if not isinstance(record, dict) or "measured" not in record:
        raise ValueError(f"{_short(path, root)} is JSON but no record, it has no measured. Write it again.")
    return record


def read_all(label=None, folder="", root=None):
    """Every record of results/label/folder (every label without one), sorted by path."""
    root = pathlib.Path(root or ROOT)
    return [read(path, root=root) for path in _record_paths(root, label, folder)]


def run_folder(run, root=None):
    """Make and return the folder of a run that starts now: runs/RUN/20260131-235959."""
    base = pathlib.Path(root or ROOT) / "runs" / _check_run(run)
    name = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):   # two runs may start in one second
        try:
            (base / (name + suffix)).mkdir(parents=True)
            return base / (name + suffix)
        except FileExistsError:
            continue
    raise FileExistsError(f"{base / name} and 98 more exist: is a loop starting runs?")


def shown_command(argv=None, root=None):
    """This process's command as typed in the root of the repository: `python folder/file.py key=value`."""
    root = pathlib.Path(root or ROOT)
    program, *arguments = argv or sys.argv
    program = pathlib.Path(program).resolve()
    return shlex.join(["python", _short(program, root) if program.is_relative_to(root) else program.name,
                       *(a.replace(f"{root}/", "") for a in arguments)])


def installed_versions():
    """{package: version} of Python and of what is installed of PACKAGES, without importing any."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def this_machine():
    """Processor, CPUs this process may use, and memory; never the name of the host."""
    found = None
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    facts = {"processor": found[1].strip() if found else platform.processor() or platform.machine(),
             "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        facts["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return facts


def path_pattern(path):
    """A regular expression that finds `path`, or what lies under it, in a text."""
    return rf"(?<![\w.-]){re.escape(str(path))}(?![\w-])"


def _machine_path(record, text, root):
    """What a record says of this machine's folders: the repository or home anywhere, any absolute path in the
    command or a setting; None where it says nothing."""
    for place in {str(root), str(pathlib.Path.home())} - {"/"}:
        if found := re.search(rf".*{path_pattern(place)}.*", text):
            return found[0]
    words = [*record["command"].split(), *(str(value) for value in record["settings"].values())]
    return next((word for word in words if re.match(r"['\"]?(-*[\w-]+=)?['\"]?(/|[A-Z]:\\)", word)), None)


def check_label(label):
    """Raise ValueError where `label` cannot name a folder of results/; None is no label."""
    if label is not None and not re.fullmatch(r"[a-z0-9_-]+", label):
        raise ValueError(f"record label {label!r} is no folder name for results/: use a-z, 0-9, _ and - (cpu2).")


def _check_run(run):
    if not re.fullmatch(r"[\w=+-][\w.=+-]*(/[\w=+-][\w.=+-]*)*", run):
        raise ValueError(f"run name {run!r} is not FOLDER/NAME of letters, digits and _ . = + - "
                         f"(strategies/3_zero_stage2).")
    return run


def _check_numbers(part, numbers):
    for key, value in numbers.items():
        if isinstance(value, (bool, str, dict, list, tuple)) or value is None:
            raise ValueError(f"{part}[{key!r}] is {value!r}, not a number. Leave out what is unknown; lists and "
                             f"words go to details.")
        if not _UNIT.fullmatch(key):
            raise ValueError(f"{part}[{key!r}] names no unit. End it in one of _{' _'.join(UNITS)}, after which "
                             f"one of _{' _'.join(STATISTICS)} may follow.")


def _plain(value, where):
    """`value` as JSON holds it. Floats keep 9 digits: enough for any fp32 number, without a clock's noise."""
    if hasattr(value, "tolist"):   # a number or an array of numpy or torch
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{where}[{str(k)!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"record {where} is {value}: JSON has no such number. Leave the key out, say it in "
                             f"outcome.")
        return float(f"{value:.9g}")
    if value is None or isinstance(value, (str, int)):
        return value
    raise ValueError(f"record {where} is a {type(value).__name__}, which JSON cannot hold. Convert it first.")


def _git_state(root):
    """{"commit":, "dirty":}, or {} where there is no git. Records written just before do not make a tree dirty."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")) != root.resolve():
            return {}
        return {"commit": git("rev-parse", "HEAD"),
                "dirty": bool(git("status", "--porcelain", "--", ".", ":!results"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _record_paths(root, label=None, folder=""):
    return sorted((root / "results" / (label or "") / folder).rglob("*.json"))


def _short(path, root):
    path = pathlib.Path(path)
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def replace_file(path, text):
    """Write a whole file or nothing: a killed writer leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments):
    command, paths = (arguments or ["help"])[0], arguments[1:]
    errors = []
    if command == "list":
        for record in read_all():
            machine = record.get("machine", {})
            print(f"{machine.get('label', '?')}/{record['run']:<40} {record['outcome']:<15} {record['date'][:10]} "
                  f"{record.get('commit', '')[:8]:<9}{machine.get('ranks', '?')} ranks")
    elif command in ("refresh", "check"):
        from yardstick import documents   # which reads records from here
        changed, errors = documents.refresh(paths) if command == "refresh" else ([], documents.check(paths))
        print("\n".join([*(f"filled {path}" for path in changed), *errors] or ["every generated block is fresh"]))
    else:
        print(__doc__.strip())
        return 0 if command in ("help", "-h", "--help") else 2
    return 1 if errors else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ValueError) as error:
        sys.exit(f"yardstick.results: {error}")
