"""Settings of a program: a CONFIG dict at the top of its file, overridden by key=value arguments.

    CONFIG = {
        "steps": 20,                      # optimizer steps
        "micro_batch": Either(int, None), # sequences per rank and forward; None: follows from the others
        "strategy": Choice("zero2", "dp", "zero1"),   # the first is the default
    }
    settings = override(CONFIG, sys.argv[1:], where="real_model_example.py")

The type of an entry is the type of its default. `Either(type, None)` is an entry that may also be left
out, `Choice(default, ...)` one that takes only the words listed.
"""

import ast
import difflib
import math
import os
import re
import tempfile
from pathlib import Path


class SettingsError(ValueError):
    """A setting that a user can mend; its text says what is wrong, where, and what to do."""


class Either:
    """An entry of `type` (int, float or str) whose default is None or another value."""

    def __init__(self, type, default=None):
        self.type, self.default = type, default


class Choice:
    """An entry that takes one of a few words; the first is the default."""

    def __init__(self, *words):
        self.words, self.default = words, words[0]


def defaults(config):
    """The plain values of a CONFIG dict: {name: value}."""
    return {key: v.default if isinstance(v, (Either, Choice)) else v for key, v in config.items()}


def nearest(word, words):
    """The most alike of `words`, or None when none is alike.

    >>> nearest("stratgy", ["strategy", "steps"])
    'strategy'
    """
    found = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.5)
    return found[0] if found else None


def given(arguments):
    """The names of the settings that `key=value` strings give, as `override` reads them.

    >>> sorted(given(["steps=5", "--micro-batch=2"]))
    ['micro_batch', 'steps']
    """
    return {argument.partition("=")[0].lstrip("-").replace("-", "_") for argument in arguments if "=" in argument}


def usage(arguments, path):
    """The help of a program, or None where `arguments` do not ask for it: its docstring and its commented CONFIG."""
    if not {"-h", "--help", "help"} & set(arguments):
        return None
    source = Path(path).read_text(encoding="utf-8")
    entries = re.search(r"^CONFIG = \{\n(.*?)^\}", source, re.MULTILINE | re.DOTALL)[1].rstrip()
    return f"{ast.get_docstring(ast.parse(source))}\n\nSettings, as key=value, with their defaults:\n\n{entries}"


def _convert(key, text, entry, where):
    if isinstance(entry, Choice):
        if text in entry.words:
            return text
        near = nearest(text, entry.words)
        raise SettingsError(f"{key}={text} is none of {', '.join(entry.words)} ({where}, CONFIG[\"{key}\"])."
                            + (f" Did you mean {key}={near}?" if near else ""))
    if isinstance(entry, Either):
        if text.lower() in ("none", ""):
            return None
        kind = entry.type
    else:
        kind = type(entry)
    wanted = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[kind]
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is int:
            return int(text.replace("_", ""))
        if kind is float and not math.isfinite(float(text)):
            wanted = "a finite number"
            raise ValueError
        return kind(text)
    except (KeyError, ValueError):
        raise SettingsError(f"{key}={text} is not {wanted} ({where}, CONFIG[\"{key}\"]). "
                            f"Give {key}={defaults({key: entry})[key]}, for example.") from None


def override(config, arguments, where="CONFIG"):
    """The settings of a run: the defaults of `config` with `key=value` strings applied in order.

    Raises SettingsError for an unknown key (naming the nearest), a value of the wrong type, or an
    argument that is no key=value.

    >>> override({"steps": 20, "lr": 1e-3}, ["steps=5"])
    {'steps': 5, 'lr': 0.001}
    >>> override({"steps": 20}, ["stepz=5"])
    Traceback (most recent call last):
    ...
    yardstick.settings.SettingsError: unknown setting stepz=5 (CONFIG). Did you mean steps?
    """
    settings = defaults(config)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        key = key.lstrip("-").replace("-", "_") if equals else key
        if not equals:
            near = nearest(key.lstrip("-"), config)
            raise SettingsError(f"{argument!r} is not key=value ({where})."
                                + (f" Did you mean {near}=...?" if near else f" Settings: {', '.join(config)}."))
        if key not in config:
            near = nearest(key, config)
            raise SettingsError(f"unknown setting {key}={text} ({where}). "
                                + (f"Did you mean {near}?" if near else f"Settings: {', '.join(config)}."))
        settings[key] = _convert(key, text, config[key], where)
    return settings


def check_writable(folder, key):
    """`folder`, after checking that it is one or can be made, and be written. key: the setting that named it, "output="."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    why = "no folder" if not there.is_dir() else "read-only here" if not os.access(there, os.W_OK) else ""
    if not why:
        try:
            tempfile.TemporaryFile(dir=there).close()        # root may write everywhere, says os.access
        except OSError as error:
            why = f"not writable ({error.strerror})"
    if why:
        raise SettingsError(f"{folder} cannot be written: {there} is {why}. Give another folder as {key}.")
    return folder
