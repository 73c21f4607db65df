"""Settings: every type converts, and what does not convert is refused in one message."""

import pytest

from yardstick.settings import Choice, Either, SettingsError, defaults, nearest, override

CONFIG = {"steps": 20, "rate": 1e-3, "fast": False, "name": "tiny", "batch": Either(int),
          "share": Either(float, 0.5), "label": Either(str), "strategy": Choice("zero2", "dp", "zero1")}


def given(*arguments):
    return override(CONFIG, arguments, where="a.py")


def refused(*arguments):
    with pytest.raises(SettingsError) as caught:
        given(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_plain_values():
    assert given() == defaults(CONFIG) == {"steps": 20, "rate": 1e-3, "fast": False, "name": "tiny", "batch": None,
                                           "share": 0.5, "label": None, "strategy": "zero2"}


@pytest.mark.parametrize("argument,value", [
    ("steps=5", 5), ("steps=1_000", 1000), ("steps=-1", -1), ("rate=2", 2.0), ("rate=3e-4", 3e-4),
    ("fast=True", True), ("fast=true", True), ("fast=1", True), ("fast=no", False), ("name=a=b", "a=b"),
    ("name=", ""), ("batch=8", 8), ("batch=None", None), ("batch=none", None), ("share=", None),
    ("share=0.25", 0.25), ("label=cpu2", "cpu2"), ("strategy=dp", "dp"), ("--steps=5", 5)])
def test_a_value_has_the_type_of_its_default(argument, value):
    key = argument.lstrip("-").partition("=")[0]
    result = given(argument)
    assert result[key] == value and type(result[key]) is type(value)
    assert {k: v for k, v in result.items() if k != key} == {k: v for k, v in given().items() if k != key}


def test_the_last_of_two_values_counts():
    assert given("steps=1", "steps=2")["steps"] == 2
    assert CONFIG["steps"] == 20


def test_dashes_of_other_programs_are_understood():
    assert override({"global_batch": 1}, ["--global-batch=8"]) == {"global_batch": 8}


@pytest.mark.parametrize("argument,parts", [
    ("stepz=5", ["unknown setting stepz=5", "(a.py)", "Did you mean steps?"]),
    ("xyzzy=5", ["unknown setting xyzzy=5", "Settings: steps, rate,"]),
    ("steps", ["'steps' is not key=value (a.py)", "Did you mean steps=...?"]),
    ("xyzzy", ["'xyzzy' is not key=value", "Settings: steps, rate,"]),
    ("steps=5.0", ["steps=5.0 is not a whole number", 'CONFIG["steps"]', "steps=20"]),
    ("steps=", ["steps= is not a whole number"]), ("rate=fast", ["rate=fast is not a number"]),
    ("fast=2", ["fast=2 is not True or False"]), ("batch=x", ["batch=x is not a whole number"]),
    ("strategy=zero3", ["strategy=zero3 is none of zero2, dp, zero1", "Did you mean strategy=zero"])])
def test_what_is_refused(argument, parts):
    message = refused(argument)
    for part in parts:
        assert part in message, message


def test_a_value_given_as_an_example_is_one_that_is_taken():
    message = refused("batch=x")
    example = message.partition("Give ")[2].partition(",")[0]
    assert given(example)["batch"] is None or isinstance(given(example)["batch"], int)


def test_nearest():
    assert nearest("stage", ["zero_stage", "offload"]) == "zero_stage"
    assert nearest("qqq", ["zero_stage", "offload"]) is None
    assert nearest(3, [30, "x"]) == "30"
