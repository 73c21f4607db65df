"""Every key of a DeepSpeed config: finds what is wrong with any user's file, and explains it key by key.

    python -m yardstick.deepspeed_config lint FILE [--ranks N] [--transformers] [--accelerator cpu]
    python -m yardstick.deepspeed_config explain FILE [--parameters 7e9 --ranks 8]    # and its findings beside the keys
    python -m yardstick.deepspeed_config annotate FILE [--write]      # the file with notes beside its keys; --write: in place

lint ends with exit status 1 where the file holds an error, and with 0 otherwise. An error is a key that DeepSpeed does
not know, a value that it cannot use, and whatever it refuses on reading the file, or ignores because of the stage;
what it takes and then fails on, or gets wrong, is a warning. DeepSpeed ignores an unknown top-level key without a word.

The keys are data (deepspeed_config.json, which a test compares with the installed DeepSpeed); what concerns several
of them is in deepspeed_rules.py, how they are explained in deepspeed_explain.py and deepspeed_annotate.py. Symbols such as
runtime/config.py:DeepSpeedConfig lie in the package deepspeed.
More than 300 lines, because reading a file and judging its keys share one look at the map.
--transformers: transformers.Trainer fills in some values that say "auto". --accelerator cpu: there will be no GPU.
"""

import argparse
import json
import math
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from yardstick import deepspeed_rules
from yardstick.settings import nearest

MAP = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
KEYS = MAP["keys"]
FIELDS = {".".join([*key.split(".")[:-1], spec["field"]]): key for key, spec in KEYS.items() if "field" in spec}
PARTS = {"optimizer.params": "optimizer", "scheduler.params": "scheduler"}       # whose keys depend on a type
ADAM = {"torch_adam": False, "adam_w_mode": True, "fp32_optimizer_states": True}  # read by the engine itself, here:
READS_ADAM = {"torch_adam": "get_optimizer_configuration", "adam_w_mode": "_configure_basic_optimizer",
              "fp32_optimizer_states": "get_optimizer_configuration"}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a config. level: "error" or "warning"; key: dotted, as the config spells it."""

    level: str
    key: str
    message: str

    def __str__(self):
        return f"{self.level}: {self.key}: {self.message}"

    @property
    def fails(self):
        """True for a warning of what DeepSpeed takes, and then ends with an exception: its message says so."""
        return self.level == "warning" and re.search(r"\bfails?\b", self.message) is not None


# Reading

def read(path):
    """The config in a file as a dict: JSON, or the HJSON that DeepSpeed reads (comments, commas at the end).

    Raises ValueError, in one line, for a file that is missing or unreadable, is no JSON object, or repeats a key.
    """
    return parse(path)[0]


def parse(path):
    """(config, text of the file)."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("it is no file")                   # a pipe would be waited for
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no config file {path}. Give the path of an existing file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a config file ({error}). Give a JSON file.") from None
    return parsed(text, path), text


def parsed(text, path):
    """The config in the text of a file."""
    try:
        import hjson
    except ModuleNotFoundError:
        raise ValueError(f"this Python ({sys.executable}) has no module hjson, by which DeepSpeed reads configs. Run `source env.sh` "
                         "first, or pip install hjson.") from None

    def once(pairs):
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{path}: the key \"{key}\" stands {keys.count(key)} times in one section, which "
                                 "DeepSpeed refuses. Keep one of them.")
        return dict(pairs)
    try:
        config = hjson.loads(text, object_pairs_hook=once)
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{path} holds {half}, which is half a character. Write the whole one, or delete it.") from None
    except hjson.HjsonDecodeError as error:
        raise ValueError(f"{path} is not JSON that DeepSpeed can read: {' '.join(str(error).split())}. Mend that line.") from None
    except OverflowError:
        raise ValueError(f"{path} holds a number that is larger than any that a computer counts with. Mend it.") from None
    except RecursionError:
        raise ValueError(f"{path} has more sections inside each other than can be read. Give a DeepSpeed config.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no config: it must be a JSON object, {{...}}. Put the keys between braces.")
    return config


def lines_of(text, config):
    """{dotted key: line of the file}."""
    return {key: text.count("\n", 0, place) + 1 for key, place in places_of(text, config).items()}


def places_of(text, config):
    """{dotted key: where in the text its value begins}, found by walking through the file in the order of the keys."""
    blank = re.compile(r'("(?:[^"\\\n]|\\.)*")|//[^\n]*|#[^\n]*|/\*.*?\*/', re.DOTALL)
    text = blank.sub(lambda m: m[1] or re.sub(r"[^\n]", " ", m[0]), text)       # comments may name keys too
    places, place = {}, 0
    for key in _walk(config):
        name = re.escape(key.rpartition(".")[2])
        if found := re.compile(rf'(?<![\w"])("{name}"|{name})\s*:').search(text, place):
            places[key] = place = found.end()
    return places


def _walk(config, prefix=""):
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{name}.")


# Keys one by one

def entry(key, config=None):
    """What the map says of a dotted key, with "read", the symbol of DeepSpeed that reads it; None for an unknown key.

    Parameters of optimizers and schedulers are looked up by the type that `config` names.
    """
    key = first_name(key)
    section, _, name = key.rpartition(".")
    if section in PARTS:
        found = implementation(PARTS[section], config or {})
        known = dict(MAP[f"{PARTS[section]}s"][found]["parameters"]) if found else {}
        read = MAP[f"{PARTS[section]}s"][found]["read"] if found else ""
        if found and section == "optimizer.params" and _kind(config) in ("adam", "adamw", "muon"):
            known = {**ADAM, **known}
            read = f"runtime/engine.py:DeepSpeedEngine.{READS_ADAM[name]}" if name in ADAM else read
        if name not in known:
            return None
        spec = MAP[f"{PARTS[section]}_parameters"][name]
        return {"null": known[name] is None, **spec, "default": known[name], "read": read}
    if key not in KEYS:
        key = next((known for known in KEYS if "*" in known
                    and re.fullmatch(re.escape(known).replace(r"\*", "[^.]+"), key)), None)
    if key is None:
        return None
    spec = KEYS[key]
    if "read" in spec:
        return spec
    return {**spec, "read": f"{KEYS[key.rpartition('.')[0]]['read']}.{spec.get('field', key.rpartition('.')[2])}"}


def first_name(key):
    """A dotted key with every part under the name that the map uses."""
    known = ""
    for name in key.split("."):
        known = f"{known}.{name}".lstrip(".")
        known = FIELDS.get(known, known)
    return known


def _kind(config):
    section = (config or {}).get("optimizer")
    kind = section.get("type") if isinstance(section, dict) else None
    return kind.lower() if isinstance(kind, str) else None


def implementation(part, config):
    """The name in MAP of the "optimizer" or "scheduler" that DeepSpeed builds from a config; None for no known one."""
    section = config.get(part) if isinstance(config.get(part), dict) else {}
    kind = section.get("type")
    if not isinstance(kind, str) or part == "scheduler":
        return kind if isinstance(kind, str) and kind in MAP["schedulers"] else None
    given = section["params"] if isinstance(section.get("params"), dict) else {}
    zero = config.get("zero_optimization") if isinstance(config.get("zero_optimization"), dict) else {}
    device = zero["offload_optimizer"].get("device") if isinstance(zero.get("offload_optimizer"), dict) else None
    cpu = device in ("cpu", "nvme") or zero.get("cpu_offload") is True
    name = kind.lower()
    if name in ("adam", "adamw"):
        if given.get("torch_adam") is True:
            return "torch.optim.Adam" if name == "adam" and given.get("adam_w_mode") is False else "torch.optim.AdamW"
        return "DeepSpeedCPUAdam" if cpu else "FusedAdam"
    names = {"adagrad": "DeepSpeedCPUAdagrad" if cpu else "torch.optim.Adagrad", "lamb": "FusedLamb",
             "lion": "DeepSpeedCPULion" if cpu else "FusedLion", "muon": "MuonWithAuxAdam",
             "muadam": "torch.optim.Adam", "muadamw": "torch.optim.AdamW", "musgd": "torch.optim.SGD"}
    name = names.get(name, f"torch.optim.{kind}")
    return name if name in MAP["optimizers"] else None


def _is(value, kind, spec):
    if kind == "int":
        whole = isinstance(value, int) or isinstance(value, float) and value.is_integer() and not spec.get("whole")
        return whole and not isinstance(value, bool) and abs(value) < 2**63
    if kind == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind in ("texts", "numbers"):
        of = "text" if kind == "texts" else "number"
        return (isinstance(value, list) and len(value) == spec.get("length", len(value))
                and all(_is(v, of, spec) or v is None and kind == "numbers" for v in value))
    return isinstance(value, {"bool": bool, "text": str, "list": list, "section": dict, "any": object}[kind])


def fits(value, spec):
    """Whether a value has a type, and lies in the range, that the map gives."""
    kinds = spec["type"] if isinstance(spec["type"], list) else [spec["type"]]
    if value is None:
        return spec.get("null", spec["default"] is None)
    if not any(_is(value, kind, spec) for kind in kinds):
        return False
    for one in value if isinstance(value, list) else [value]:
        number = isinstance(one, (int, float)) and not isinstance(one, bool)
        if number and (one < spec.get("min", one) or one > spec.get("max", one)
                       or one <= spec.get("above", -math.inf) or one >= spec.get("below", math.inf)):
            return False
        # choices are for words, or for the one kind that a key has: [I, T] with ["auto"] takes any number as well
        if "choices" in spec and (isinstance(one, str) and one is value or kinds in (["int"], ["texts"], ["number"])):
            words = [str(word).lower() for word in spec["choices"]] if spec.get("any_case") else spec["choices"]
            if (one.lower() if spec.get("any_case") else one) not in words:
                return False
    return value != "" or not spec.get("filled")


def _wanted(spec, value=None):
    """What a value must be, in words."""
    if "choices" in spec and spec["type"] != "texts":
        words = ", ".join(json.dumps(word) for word in spec["choices"])
        more = "a whole number or " if "int" in spec["type"] and isinstance(spec["type"], list) else ""
        return f"{more}one of {words}" if spec["choices"] else "left out of a file"
    words = {"bool": "true or false", "int": "a whole number", "number": "a number", "text": "a text", "list": "a list [...]",
             "texts": "a list of texts", "numbers": "a list of numbers", "section": "a section {...}", "any": "anything"}
    kinds = spec["type"] if isinstance(spec["type"], list) else [spec["type"]]
    text = " or ".join(words[kind] for kind in kinds)
    limits = {"length": "of length", "min": "at least", "max": "at most", "above": "more than", "below": "less than"}
    text += "".join(f", {limit} {spec[name]:,}" for name, limit in limits.items() if name in spec)
    if kinds == ["int"] and isinstance(value, (int, float)) and abs(value) >= 2**63:
        text += ", of 64 bits"
    text += f" out of {', '.join(spec['choices'])}" if spec.get("choices") else ""
    return text + (", not empty" if spec.get("filled") else "")


def _unknown(key, config):
    """The message for a key that the map lacks, which may be one that DeepSpeed has removed."""
    section, _, name = key.rpartition(".")
    if key in MAP["removed"]:
        return f"DeepSpeed has removed this key. Delete it; in its place: {MAP['removed'][key]}."
    if section in PARTS:
        found = implementation(PARTS[section], config)
        siblings = [*MAP[f"{PARTS[section]}s"][found]["parameters"], *(ADAM if section == "optimizer.params" else {})]
        what = f"{found}, which this config selects, has no such parameter"
    else:
        siblings = [known.rpartition(".")[2] for known in (*KEYS, *FIELDS) if known.rpartition(".")[0] == section]
        what = "unknown key, DeepSpeed " + ("refuses it" if KEYS.get(section, {}).get("strict") else "ignores it without a word")
    if re.match(r"[_/#]|comment", name):
        return f"{what}. Write a comment as // text, which DeepSpeed reads."
    places = [known for known in KEYS if known.rpartition(".")[2] == name and known != key]
    for params, part in PARTS.items():
        if name in MAP[f"{part}_parameters"] and params != section:
            places.append(f"{params}.{name}")
    if 1 <= len(places) <= 2:
        return f"{what}. Its place is " + " or ".join(f'"{place}"' for place in places) + "."
    near = nearest(name.lower(), siblings)
    return f"{what}. " + (f"Did you mean \"{near}\"?" if near else "Delete it.")


def _unknown_type(part, name):
    """The message for an optimizer or a schedule that DeepSpeed does not have."""
    if name.lower() in MAP["removed_optimizers"]:
        return f"DeepSpeed has removed {name}. Use \"{MAP['removed_optimizers'][name.lower()]}\"."
    known = list(MAP["schedulers"]) if part == "scheduler" else [
        "Adam", "AdamW", "Lamb", "Lion", "Muon", *(n[12:] for n in MAP["optimizers"] if n.startswith("torch.optim."))]
    near = nearest(name, known)
    return (f"{json.dumps(name)} is none that DeepSpeed or torch has. "
            + (f"Did you mean \"{near}\"?" if near else f"Use one of {', '.join(sorted(set(known)))}."))


def check_keys(config, *, transformers=False):
    """Findings on each key by itself: unknown, removed or renamed, wrong type, out of range, "auto"."""
    return _check_keys(config, transformers)[0]


def _check_keys(config, transformers=False):
    """(findings, {dotted key: value} of what is sound, by its first name, {dotted key: as the config spells it})."""
    findings, sound, spelled = [], {}, {}
    error = lambda key, message: findings.append(Finding("error", key, message))
    warn = lambda key, message: findings.append(Finding("warning", key, message))

    def walk(section, prefix):
        for name, value in section.items():
            raw = f"{prefix}{name}"
            if "." in name:
                section, _, last = raw.rpartition(".")
                error(raw, f"a name with a dot is an unknown key: sections are nested. Write {{\"{section}\": {{\"{last}\": ...}}}}."
                      if raw in KEYS else "unknown key: no name of DeepSpeed's has a dot. Delete it.")
                continue
            key, spec = FIELDS.get(raw, raw), entry(raw, config)
            if spec is None:
                error(raw, _unknown(raw, config))
                continue
            if key in spelled:                                # bf16 counts where bfloat16 is given too
                strict = KEYS.get(prefix[:-1], {}).get("strict")
                (error if strict else warn)(raw, f"given twice, as \"{spelled[key]}\" too. Keep \"{key}\".")
                if strict or raw != key:
                    continue
            spelled[key] = raw
            if value == "auto" and not spec.get("auto"):
                default = json.dumps(spec["default"])
                if not transformers:
                    error(raw, "\"auto\" is filled in by transformers only, DeepSpeed does not know it. Write a value"
                               f"{'' if spec['default'] is None else f' (default {default})'}.")
                elif not spec.get("transformers"):
                    warn(raw, f"transformers does not fill this one in; the default, {default}, may count. Write a value.")
                continue
            if not fits(value, spec):
                error(raw, f"{json.dumps(value)} must be {_wanted(spec, value)}.")
                continue
            part = key.removesuffix(".type")
            if part in PARTS.values() and part != key and value is not None and not implementation(part, config):
                error(raw, _unknown_type(part, value))
                continue
            if key != raw:
                warn(raw, f"DeepSpeed reads this as \"{key}\". Write that name.")
            if "deprecated" in spec:
                warn(raw, f"outdated. Use \"{spec['deprecated']}\".")
            if spec.get("program"):
                warn(raw, "DeepSpeed sets this itself. Delete it.")
            sound[key] = value
            if spec.get("becomes") and value:                 # DeepSpeedConfigModel._process_deprecated_field
                sound.setdefault(f"zero_optimization.{spec['becomes']}{'.device' if 'offload' in spec['becomes'] else ''}",
                                 "cpu" if "offload" in spec["becomes"] else value)
            if key in PARTS and value and not implementation(PARTS[key], config):
                if "type" not in config[PARTS[key]]:              # a wrong type is said where it stands
                    error(raw, f"DeepSpeed ignores it without \"{PARTS[key]}.type\". Give the type.")
            elif isinstance(value, dict) and not spec.get("free"):
                walk(value, f"{key}.")
    walk(config, "")
    return findings, sound, spelled


# The whole config

def lint(config, *, ranks=None, transformers=False, accelerator=None):
    """Findings on a config (a dict), in its order.

    ranks: data-parallel ranks, without which the product of the batch sizes cannot be checked. transformers: "auto" is
    allowed. accelerator: "cpu" adds what only a run without a GPU trips over.
    """
    findings, sound, spelled = _check_keys(config, transformers)
    seen = deepspeed_rules.View(sound, spelled, lambda key: KEYS[key], implementation("optimizer", config),
                                implementation("scheduler", config), ranks, accelerator)
    for level, key, message in deepspeed_rules.findings(seen, MAP):
        if not any(f.key == spelled.get(key, key) and f.level == "error" for f in findings):     # said already
            findings.append(Finding(level, spelled.get(key, key), message))
    order = {key: place for place, key in enumerate(_walk(config))}
    return sorted(findings, key=lambda f: order.get(f.key, len(order)))


def main(arguments):
    from yardstick import deepspeed_annotate, deepspeed_explain      # they read this module
    from yardstick.deepspeed_source import Package
    parser = argparse.ArgumentParser(prog="python -m yardstick.deepspeed_config", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["lint", "explain", "annotate"])
    parser.add_argument("file")
    parser.add_argument("--ranks", type=int, help="data-parallel ranks, to check the product of the batch sizes")
    parser.add_argument("--transformers", action="store_true", help="transformers.Trainer fills in \"auto\"")
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], help="what the config will run on")
    parser.add_argument("--parameters", type=float, help="explain: parameters of the model, to compute what keys cost")
    parser.add_argument("--write", action="store_true", help="annotate: write the file itself, in place of printing it")
    given = vars(parser.parse_args(arguments))
    command, path, parameters, write = (given.pop(name) for name in ("command", "file", "parameters", "write"))
    for name, value in (("ranks", given["ranks"]), ("parameters", parameters)):
        if value is not None and not 1 <= value < math.inf:
            raise ValueError(f"--{name} {value} is no number of {name}. Give 1 or more.")
    if parameters and command != "explain" or write and command != "annotate":
        raise ValueError(f"{'--write belongs to annotate' if write else '--parameters belongs to explain'}. Leave it out of {command}.")
    config, text = parse(path)
    if command == "explain":
        sizes = {name: value for name, value in (("P", parameters), ("N", given["ranks"])) if value}
        try:
            package, lines = Package.at(), None
        except ValueError as error:
            package, lines = None, f"no lines are named: {error}"
        print(deepspeed_explain.explain(config, sizes, package, **given))
        print("P parameters of the model, N ranks, value the key's own: --parameters 7e9 --ranks 8 puts numbers in")
        print(lines or f"lines are of DeepSpeed {package.version}: {package.folder}")
        return 0
    if command == "annotate":
        if write:
            deepspeed_annotate.write(path)
        print(f"{path}: written\n" if write else deepspeed_annotate.annotate(path), end="")
        return 0
    lines, found = lines_of(text, config), lint(config, **given)
    for finding in found:
        print(f"{path}{f':{lines[finding.key]}' if finding.key in lines else ''}: {finding}")
    if not found:
        print(f"{path}: no findings")
    return 1 if any(finding.level == "error" for finding in found) else 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)    # `| head` closes early; that is no error
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as mistake:
        print(f"yardstick.deepspeed_config: {mistake}", file=sys.stderr)
        sys.exit(1)
