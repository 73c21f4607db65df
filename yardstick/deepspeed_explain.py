"""Explains a DeepSpeed config key by key: meaning, unit, default, range, cost, places in DeepSpeed, and what is wrong.

What a key means and costs is in deepspeed_config.json, its places in DeepSpeed are anchors of deepspeed_map.json and
lines of the installed package, what is wrong with it the linter says. In a cost {buffer_count * width} is a formula: width is
the bytes of a weight (2 or 4), value the key's own value, P the parameters of the model, N the ranks; it is computed where
all of it is known.
"""

import ast
import json
import re
import textwrap

from yardstick import deepspeed_config, deepspeed_map
from yardstick.deepspeed_config import KEYS

WIDTH = 100                        # columns of the text

# Anchors that a config reaches, where not all do: by name or group, the stages, or the section that must be there.
STAGES = {"zero12": (1, 2), "zero3": (3,), "engine.clip": (0,), "engine.reduce_bucket": (0,), "offload.configure3": (3,),
          "offload.host_weights": (3,)}


# What is known of a key

def facts(key, config, sizes=()):
    """[text]: what a known key means; its unit, default and range; what it costs; what it acts with.

    sizes: {"P": parameters of the model, "N": ranks}, as far as they are known.
    """
    spec = deepspeed_config.entry(key, config)
    texts = [spec["says"], (f"unit {spec['unit']}; " if "unit" in spec else "") + f"default {plain(spec['default'])}; range {limits(spec)}"]
    if "cost" in spec:
        texts.append("cost: " + re.sub(r"\{(.+?)\}", lambda match: _price(match[1], key, config, dict(sizes)), spec["cost"]))
    if "with" in spec:
        texts.append(f"with: {spec['with']}")
    return texts


def limits(spec):
    """The values that a key takes: ">= 0", "> 0 and < 1", "none | cpu | nvme", "true | false"."""
    if "range" in spec:
        return spec["range"]
    kinds = spec["type"] if isinstance(spec["type"], list) else [spec["type"]]
    bounds = " and ".join(f"{sign} {plain(spec[name])}" for name, sign in
                          (("min", ">="), ("above", ">"), ("max", "<="), ("below", "<")) if name in spec)
    choices = " | ".join(plain(choice) for choice in spec.get("choices", ()))
    words = {"bool": "true | false", "int": bounds or "any whole number", "number": bounds or "any number", "text": "any text",
             "list": "a list", "texts": f"a list of {choices or 'texts'}", "section": "a section", "any": "set by a program",
             "numbers": f"{spec.get('length', 'a list of')} numbers" + (f", {bounds}" if bounds else "")}
    if choices:
        words["text"] = choices
        if kinds in (["int"], ["number"]):
            return choices
    if "choices" in spec and not spec["choices"]:
        return "left out of a file"
    return " | ".join(words[kind] for kind in kinds) + (" | null" if spec.get("null") and spec["default"] is not None else "")


def plain(value):
    """A value as a file may have it, round numbers short: 5e7, 1048576, true, none.

    >>> [plain(value) for value in (50000000, 1e9, 1048576, 0.1, 1e-08, None, False, "auto", [0.9, 0.999])]
    ['5e7', '1e9', '1048576', '0.1', '1e-08', 'none', 'false', 'auto', '[0.9, 0.999]']
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) >= 1e5:
        short = f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
        return short if float(short) == value else str(int(value)) if value == int(value) else str(value)
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _price(formula, key, config, sizes):
    """"value x 2 bytes = 10.0 MB", without the result where a part of it is unknown."""
    width = 2 if any(value_of(config, f"{name}.enabled") is True for name in ("bf16", "bfloat16", "fp16")) else 4
    names = {node.id for node in ast.walk(ast.parse(formula, mode="eval")) if isinstance(node, ast.Name)}
    known = {name: {"width": width, **sizes}.get(name, _number(name, key, config)) for name in names}
    shown = re.sub(r"(\d) \* (?=P)", r"\1", formula.replace("width", str(width))).replace(" / ", "/").replace("*", "x") + " bytes"
    if None in known.values() or "/ value" in formula and not known["value"]:
        return shown
    return f"{shown} = {size(eval(formula, {}, known))}"


def _number(name, key, config):
    """The number that a name in the formula of `key` stands for, a key of its section or of one around it; else None."""
    parts = key.split(".")
    around = (".".join([*parts[:depth], name]) for depth in range(len(parts) - 1, 0, -1))
    key = key if name == "value" else next((place for place in around if place in KEYS), None)
    if key is None:
        return None
    value, spec = value_of(config, key), deepspeed_config.entry(key, config)
    value = spec["default"] if value is None else value
    return value if isinstance(value, (int, float)) and value is not True and deepspeed_config.fits(value, spec) else None


def size(nbytes):
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.1f} {unit}"
    return f"{nbytes:.0f} bytes"


def value_of(config, key):
    """The value of a dotted key, None where it is not given."""
    for name in key.split("."):
        if not isinstance(config, dict) or name not in config:
            return None
        config = config[name]
    return config


# Its places in DeepSpeed

def reader(key, config):
    """(anchor or None, file, symbol, name) of what reads a known key, and the name that it has there; in torch no file but a symbol."""
    file, colon, symbol = deepspeed_config.entry(key, config)["read"].partition(":")
    key = deepspeed_config.first_name(key)
    name = key.rpartition(".")[2]
    if not colon:
        return None, None, file, name
    section = KEYS.get(key.rpartition(".")[0], {})
    if "read" not in KEYS.get(key, {"read": ""}) and section.get("strict"):      # a field of a class
        symbol, _, name = symbol.rpartition(".")
    places = deepspeed_map.places()
    anchor = places.get((file, symbol)) or places.get((file, f"{symbol}.__init__"))
    return anchor, file, symbol, name


def users(key, config):
    """[(anchor, expression)]: where this config's run uses what the key says, and how the code there spells it."""
    stage = value_of(config, "zero_optimization.stage") or 0
    on = [value_of(config, f"zero_optimization.{section}.device") for section in ("offload_param", "offload_optimizer")]
    there = {"nvme": "nvme" in on, "zenflow": bool(value_of(config, "zero_optimization.zenflow"))}
    found = []
    for anchor, expression in deepspeed_config.entry(key, config).get("used", {}).items():
        name = anchor.removeprefix("ds:")
        group = name.split(".")[0]
        if stage in STAGES.get(name, STAGES.get(group, (stage,))) and there.get(group, True):
            found.append((name, expression))
    return found


def line_of(package, file, symbol, name):
    """The line on which a symbol of DeepSpeed reads the key `name`: a field, a parameter, a text or a constant called so.

    None where the symbol is not there, or does not name it.
    """
    node = package.find(file, symbol)
    found = {1: [], 2: []}
    for child in ast.walk(node) if node is not None else ():
        if isinstance(child, ast.arg) and child.arg == name or isinstance(child, ast.Constant) and child.value == name or (
                isinstance(child, ast.AnnAssign) and ast.unparse(child.target) == name):
            found[1].append(child.lineno)
        elif isinstance(child, ast.Name) and name.upper() in child.id:
            found[2].append(child.lineno)
    return min(found[1] or found[2], default=None)


def _places(key, config, package):
    """Where a known key is read and used: file and line in the package, or file and symbol, with the anchor."""
    places = [("read", *reader(key, config))]
    for anchor, expression in users(key, config):
        place = deepspeed_map.ANCHORS[anchor]
        places.append(("used", anchor, place["file"], place["symbol"], expression))
    for word, anchor, file, symbol, what in places:
        where = f"{file}: {symbol}" if file and symbol else file or symbol
        if package and file and symbol and package.find(file, symbol) is None:
            where += f", which is not in DeepSpeed {package.version}"
        elif package and file and symbol:
            lines = package.landmarks(file, symbol, what) if word == "used" else [line_of(package, file, symbol, what)]
            where = f"{file}:{next(filter(None, lines), package.lines(file, symbol)[0])}" + ("" if anchor else f", {symbol}")
        yield f"{word}: {where}" + (f", ds:{anchor}" if anchor else below(file))


def below(file):
    """What stands in for the anchor of a reader that has none: the sections are read by what ds:config.read calls."""
    return ", below ds:config.read" if file and file.endswith("config.py") else ""


# As a text

def explain(config, sizes=(), package=None, **options):
    """A text of lines up to 100 columns: each key in its order, its value, what is known of it, and what the linter finds there.

    sizes: as for `facts`. package: the DeepSpeed whose lines are named; None: files and symbols in their place. options: as for
    deepspeed_config.lint.
    """
    found, elsewhere = by_key(config, options)
    out = []
    for key, name, value, depth in walk(config):
        spec, indent = deepspeed_config.entry(key, config), "  " * depth
        out += ["", *_wrapped(name if isinstance(value, dict) else f"{name} = {json.dumps(value, ensure_ascii=False)}", indent)]
        texts = [] if spec is None else [*facts(key, config, sizes), *_places(key, config, package)]
        for text in texts + [f"! {finding.level}: {finding.message}" for finding in found.get(key, ())]:
            out += _wrapped(text, indent + "    ")
    if elsewhere:
        out += ["", "not in the file:", *(line for finding in elsewhere for line in _wrapped(f"! {finding}", "    "))]
    count = sum(map(len, [elsewhere, *found.values()]))
    return "\n".join([*out[1:], "", f"{count} finding{'s' * (count != 1)}"])


def by_key(config, options):
    """({dotted key as the file spells it: findings there}, findings on what is not in the file)."""
    keys = [key for key, *_ in walk(config)]
    spelled = {deepspeed_config.first_name(key): key for key in keys} | {key: key for key in keys}
    found, elsewhere = {}, []
    for finding in deepspeed_config.lint(config, **options):
        (found.setdefault(spelled[finding.key], []) if finding.key in spelled else elsewhere).append(finding)
    return found, elsewhere


def _wrapped(text, indent):
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def walk(section, prefix="", depth=0):
    """(dotted key, name, value, depth) of each key, in the order of the file."""
    for name, value in section.items():
        yield prefix + name, name, value, depth
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{name}.", depth + 1)
