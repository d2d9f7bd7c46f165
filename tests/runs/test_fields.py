import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from torch import Tensor, nn

from metaaug_fast import MAML, Reptile, models
from metaaug_fast.runs.fields import (
    REQUIRED,
    UNSET,
    Field,
    as_declared,
    fields_of,
    parameters_of,
    read_options,
    spellings,
)


def named(fields):
    return {each.name: each for each in fields}


def test_the_fields_of_a_learner_are_what_a_file_can_give():
    found = named(fields_of("learner", Reptile, "reptile"))
    assert {"inner_lr", "inner_steps", "inner_batch", "batched", "betas", "loss", "adapt"} <= set(found)
    assert not {"model", "seed", "meta_lr", "self"} & set(found)
    assert found["betas"].default == [0.0, 0.999]
    assert found["inner_batch"].default is None
    assert found["inner_batch"].of_file(None) is None
    assert found["inner_lr"].of_option("{head.weight: 0.5}") == {"head.weight": 0.5}
    assert "see `inner_loop`" in found["inner_lr"].help


def test_constructors_of_all_kinds():
    def function(a, b: int = 2, *more, c: float, d: str = "x", **rest):
        pass

    class Parent:
        def __init__(self, model, first: int = 1, second: float = 2.0):
            pass

    class Child(Parent):
        def __init__(self, model, third: bool = False, second: float = 3.0, **options):
            pass

    class Heir(Child):
        pass

    class Closed(Parent):
        def __init__(self, *arguments):
            pass

    class Empty:
        pass

    assert list(parameters_of(function)) == ["a", "b", "c", "d"]
    assert list(parameters_of(partial(function, 1, c=3.0))) == ["b", "c", "d"]
    assert parameters_of(partial(function, c=3.0))["b"].annotation is int
    assert parameters_of(Heir) == parameters_of(Child)
    assert list(parameters_of(Child)) == ["model", "third", "second", "first"]
    assert parameters_of(Child)["second"].default == 3.0
    assert not parameters_of(Closed)
    assert not parameters_of(Empty)
    assert set(parameters_of(Reptile)) == set(inspect.signature(Reptile).parameters)
    assert parameters_of(MAML).keys() > inspect.signature(MAML).parameters.keys() - {"options"}
    with pytest.raises(ValueError, match="getattr does not say which arguments it takes"):
        parameters_of(getattr)


def test_defaults_and_types_that_files_have_not():
    class Any_(nn.Module):
        def __init__(
            self,
            activation=nn.ReLU,
            name: str = "x",
            loss: str | Callable[..., Tensor] = math.dist,
            scale: np.ndarray | None = None,
            rate: float = np.float64(0.5),
            size: int = None,  # noqa: RUF013
            root: Path = Path("a"),
            place: str | PathLike[str] = "b",
            pair: tuple[int, str] = (1, "a"),
            shape: Sequence[int] = (1, 2),
            names: "Iterable[str] | None" = None,
            table: Mapping[str, Sequence[int]] | None = None,
            kind: Literal["a", "b"] = "a",
        ):
            pass

    found = named(fields_of("learner", Any_, "own"))
    assert set(found) == {
        "activation",
        "loss",
        "rate",
        "size",
        "root",
        "place",
        "pair",
        "shape",
        "names",
        "table",
        "kind",
    }
    assert found["activation"].default is found["loss"].default is found["rate"].default is UNSET
    assert found["loss"].of_file("mse") == "mse"
    assert found["size"].of_file(None) is None
    assert found["size"].of_option("3") == 3
    assert found["root"].default == "a"
    assert found["root"].of_file(Path("b")) == "b"
    assert found["pair"].of_file([2, "b"]) == found["pair"].of_file((2, "b")) == [2, "b"]
    assert found["shape"].of_file((3,)) == [3]
    assert found["names"].of_option("[a, b]") == ["a", "b"]
    assert found["table"].of_file({"a.b": [1]}) == {"a.b": [1]}
    with pytest.raises(ValueError, match=r"learner.kind must be 'a' or 'b' \(got c\)"):
        found["kind"].of_option("c")
    with pytest.raises(ValueError, match=r"learner.shape must be a list of integers \(got \[2.5\]\)"):
        found["shape"].of_file([2.5])


def test_where_a_function_may_stand_it_goes_by_its_name():
    def build(
        a: str | Callable, b: "Callable[[int], int] | str | None" = None, c: str = "x:y", d=None, e: int | Callable = 1
    ):
        pass

    found = named(fields_of("data", build, "own:build"))
    assert [name for name, each in found.items() if each.call] == ["a", "b", "e"]
    assert found["a"].names_function("math:sqrt")
    assert not any(found["a"].names_function(value) for value in ("words", None, UNSET, REQUIRED))
    assert not found["c"].names_function("math:sqrt")
    given = {"a": "math:sqrt", "b": "words", "c": "math:sqrt", "d": "math:sqrt"}
    assert as_declared(build, given, None) == given | {"a": math.sqrt}
    assert as_declared(build, given, ["math"])["a"] is math.sqrt
    with pytest.raises(ValueError, match=r"a math:sqrt is code outside this package, .*--allow math"):
        as_declared(build, given, [])
    with pytest.raises(ValueError, match=r"a must name what can be called \(got 'math:pi', float\)"):
        as_declared(build, {"a": "math:pi"}, None)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("other: nn.Module", "no file can give its other; a run gives model, seed, meta_lr"),
        ("x: Tensor | None", "no file can give its x"),
        ("name: str", "no file can give its name"),
        ("x, /", "no file can give its x"),
    ],
)
def test_arguments_that_no_file_can_give(parameter, message):
    scope = {"nn": nn, "Tensor": Tensor}
    exec(f"class Own:\n    def __init__(self, {parameter}): pass", scope)
    with pytest.raises(ValueError, match=f"learner 'own:Own' cannot be configured: {message}"):
        fields_of("learner", scope["Own"], "own:Own")


def test_annotations_that_name_what_is_not_there():
    def build(rate: "Missing" = 0.5, required: "AlsoMissing" = REQUIRED):  # noqa: F821
        pass

    found = named(fields_of("data", build, "own:build"))
    assert found["rate"].type is Any
    assert found["rate"].of_option("0.25") == 0.25
    assert found["required"].default is REQUIRED


def test_a_ready_module_has_no_fields():
    assert fields_of("model", nn.Linear(2, 2), "own:net") == []
    assert {each.name: each.default for each in fields_of("model", models.conv4, "conv4")}["ways"] is None


@pytest.mark.parametrize(
    ("type_", "text", "value"),
    [
        (int, "3", 3), (int, "-3", -3), (float, "1e-3", 1e-3), (float, "2", 2.0), (bool, "false", False),
        (bool, "True", True), (str, "null", "null"), (str, "12", "12"), (str, "", ""), (str, "a: b", "a: b"),
        (str | None, "null", None), (list[int], "[1, 2]", [1, 2]), (str | list[str] | None, "[a.*, b]", ["a.*", "b"]),
        (str | list[str] | None, "head.*", "head.*"), (float | dict[str, float], "{a.b: 1}", {"a.b": 1.0}),
        (float | list[float], "[0.1, 1]", [0.1, 1.0]), (Any, "[1, {a: x}]", [1, {"a": "x"}]), (list[Any], "[1]", [1]),
    ],
)  # fmt: skip
def test_text_becomes_a_value(type_, text, value):
    found = Field("learner", "x", type_, REQUIRED).of_option(text)
    assert found == value
    assert type(found) is type(value)
    assert Field("learner", "x", type_, REQUIRED).of_file(value) == value


@pytest.mark.parametrize(
    ("type_", "value", "message"),
    [
        (int, 2.5, "an integer (got 2.5)"), (int, True, "an integer (got True)"), (int, None, "an integer (got none)"),
        (float, "x", "a number (got 'x')"), (float, True, "a number (got True)"), (bool, 1, "true or false (got 1)"),
        (str, 3, "text (got 3)"), (str, None, "text (got none)"), (list[int], 3, "a list of integers (got 3)"),
        (list[float], [1, "x"], "a list of numbers (got [1, 'x'])"), (int | None, "x", "an integer or null (got 'x')"),
        (dict[str, float], {"a": "x"}, "a mapping from text to numbers (got {'a': 'x'})"),
        (str | list[str] | None, 3, "text, a list of text or null (got 3)"),
    ],
)  # fmt: skip
def test_values_of_another_type(type_, value, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        Field("learner", "x", type_, REQUIRED).of_file(value)
    assert str(raised.value) == f"learner.x must be {message}"


def test_numbers_that_yaml_takes_for_text():
    assert Field("learner", "x", float, 0.1).of_file("1e-3") == 1e-3


FIELDS = [
    Field("learner", "inner_lr", float, 0.1), Field("learner", "flag", bool, False), Field("learner", "steps", int, 1),
    Field("training", "steps", int, 5), Field("data", "out", str, "x"), Field("data", "x", int | None, 0),
]  # fmt: skip
SECTIONS = ("learner", "training", "data")


def test_every_spelling_of_an_option():
    for option in ("--inner-lr", "--inner_lr", "--learner.inner_lr", "--learner.inner-lr"):
        for given in ([option, "0.5"], [f"{option}=0.5"]):
            assert read_options(FIELDS, given, SECTIONS) == {"learner.inner_lr": 0.5}
    assert read_options(FIELDS, ["--steps", "2", "--learner.steps", "3"], SECTIONS) == {
        "training.steps": 2,
        "learner.steps": 3,
    }
    assert read_options(FIELDS, ["--flag", "--x", "null"], SECTIONS) == {"learner.flag": True, "data.x": None}
    maybe = [Field("data", "maybe", bool | None, None)]
    assert [
        read_options(maybe, [*each], ["data"]) for each in (["--maybe"], ["--maybe=null"], ["--maybe", "false"])
    ] == [{"data.maybe": value} for value in (True, None, False)]
    assert read_options(FIELDS, ["--flag", "false", "--x=-3"], SECTIONS) == {"learner.flag": False, "data.x": -3}
    assert read_options(FIELDS, ["--inner-lr", "-0.5"], SECTIONS) == {"learner.inner_lr": -0.5}
    assert read_options(FIELDS, ["--x", "1", "--x", "2"], SECTIONS) == {"data.x": 2}
    assert read_options(FIELDS, [], SECTIONS) == {}


def test_short_names_that_are_taken():
    names = spellings(FIELDS, ["--out"])
    assert names["training.steps"][0] == "--steps"
    assert names["learner.steps"] == ["--learner.steps"]
    assert names["data.out"] == ["--data.out"]
    assert read_options(FIELDS, ["--data.out", "y"], SECTIONS, ["--out"]) == {"data.out": "y"}
    with pytest.raises(ValueError, match="--out is no option here"):
        read_options(FIELDS, ["--out", "y"], SECTIONS, ["--out"])


def test_a_short_name_means_the_same_whatever_may_be_given():
    assert read_options(FIELDS, ["--learner.steps", "3"], ["learner"]) == {"learner.steps": 3}
    with pytest.raises(ValueError, match="--steps is no option here"):
        read_options(FIELDS, ["--steps", "3"], ["learner"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inner-l", "3"], r"--inner-l is no option here; did you mean '--inner-lr'\? \(--help lists them\)"),
        (["--qiet"], r"--qiet is no option here; did you mean '--quiet'\?"),
        (["--zzz=3"], r"--zzz is no option here \(--help"),
        (["more"], r"what follows must be options and their values \(got 'more'\)"),
        (["--x", "1", "more"], r"what follows must be options and their values \(got 'more'\)"),
        (["--x"], r"data.x must be given a value, an integer or null \(got none\)"),
        (["--x", "--flag"], r"data.x must be given a value, an integer or null \(got none\)"),
        (["--x=y"], r"data.x must be an integer or null \(got y\)"),
        (["--flag", "maybe"], r"learner.flag must be true or false \(got maybe\)"),
    ],
)
def test_options_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        read_options(FIELDS, arguments, SECTIONS, ["--quiet"])


def test_lists_out_of_a_file_are_what_is_declared():
    had = [1]

    def build(a: list[int], b: tuple[int, ...], c: Sequence[int], d, e=(1,), f=had, g: list[int] | None = None, h=0):
        pass

    given = {name: [1, [2]] for name in "abcdefg"} | {"h": 3}
    made = as_declared(build, given, None)
    assert {name for name, value in made.items() if isinstance(value, list)} == {"a", "f", "g"}
    assert made["b"] == (1, (2,))
    assert made["h"] == 3
