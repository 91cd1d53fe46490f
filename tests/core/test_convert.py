"""Values to types: Python and text alike, all problems at once, and nothing but problems whatever is written."""

import dataclasses
import inspect
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.adapters.node import Lora, NoAdapter
from llmkit.core.config import Conflict, Duration, Size, config, setting
from llmkit.core.convert import convert, wrapped
from llmkit.core.errors import RecipeError
from llmkit.core.scalars import BAD, Origin, Value
from llmkit.core.wording import Report
from llmkit.data.node import Data, Jsonl
from llmkit.inference.speculation.node import DraftModel, EarlyExit, Speculation
from llmkit.models.node import Nf4
from llmkit.recipe.kinds import Stage
from llmkit.stages.sft import Sft
from llmkit.train.node import Checkpointing
from llmkit.train.optim import AdamW

DATA = Data(train=[Jsonl(path="a.jsonl")])


def read(hint, text, quoted=False):
    report = Report()
    made = convert(hint, Value(text, Origin("file", "r.yaml", 1, 1), quoted), "key", report)
    return made, [str(p) for p in report.problems]


def refused(make):
    with pytest.raises(RecipeError) as caught:
        make()
    return [str(p) for p in caught.value.problems]


def test_a_node_built_in_python_takes_what_a_recipe_takes():
    node = Sft(model="tiny", data=DATA, adapter="none", optim={"kind": "adamw", "lr": 1}, out=Path("runs") / "x")
    assert node.model.name == "tiny" and node.adapter == NoAdapter() and node.out == "runs/x"
    assert node.optim == AdamW(lr=1.0) and isinstance(node.optim.lr, float)
    assert Sft(model=Path("tiny"), data=DATA, out="x").model.name == "tiny"


def test_a_node_built_in_python_tells_every_problem_at_once():
    assert refused(lambda: Lora(rank="8")) == ["rank: '8' is not a whole number; fix: use a whole number"]
    said = refused(lambda: Lora(rank=0, alpha="x", dropout=1.0, targets=3, init="gaussian"))
    assert len(said) == 5 and said[4].startswith("init: 'gaussian' is not default | pissa")
    assert refused(lambda: Sft(model="x", data=DATA, epochs=1, steps=1, out="x"))[0].startswith("epochs: contradicts")
    assert refused(lambda: Sft(model="x", data=DATA, quant=Lora(), out="x"))[0].startswith("quant: Lora is not none |")
    assert "steps: true is not a whole number" in refused(lambda: Sft(model="x", data=DATA, steps=True, out="x"))[0]


def test_names_of_a_node_built_in_python_are_told_as_keys_of_a_recipe_are():
    assert refused(lambda: Lora(rnak=8, rank="x")) == [
        "rnak: unknown key, did you mean rank?; fix: write rank",
        "rank: 'x' is not a whole number; fix: use a whole number",
    ]
    assert refused(lambda: Sft(model="x", dtaa=DATA)) == [
        "dtaa: unknown key, did you mean data?; fix: write data",
        "data: is missing; fix: add data",
        "out: is missing; fix: add out",
    ]
    assert dataclasses.replace(Lora(rank=8), alpha=4.0) == Lora(rank=8, alpha=4.0)  # the control
    assert list(inspect.signature(Lora).parameters) == [item.name for item in dataclasses.fields(Lora)]
    with pytest.raises(TypeError, match="positional"):
        Lora(8)


def test_nothing_in_the_place_of_a_value_is_to_be_left_out():
    assert refused(lambda: Lora(rank=None)) == ["rank: null is not a whole number; fix: leave it out"]
    assert refused(lambda: Sft(model="x", data=DATA, out=None)) == ["out: null is not text; fix: quote it"]


@config
class _Inner:
    kind: Literal["inner"] = "inner"
    a: int = setting(default=1, least=1)
    b: int = 2

    def problems(self):
        if self.a > self.b:
            yield Conflict("a", "is the larger", "swap them", "b")


@config
class _Outer:
    _short: ClassVar[str] = "size"
    size: Size = 0
    wait: Duration | None = None
    later: int = setting(default=7, later=True)
    inner: _Inner = _Inner()


def outer(**held):
    report = Report()
    return convert(_Outer, wrapped(held), "", report), [str(p) for p in report.problems]


def test_units_shorthand_and_what_comes_later():
    made, said = read(_Outer, "4KiB")
    assert (made, said) == (_Outer(size=4096), [])
    assert outer(wait="10m")[0].wait == 600.0 and outer(wait=None)[0].wait is None
    assert outer(later=7) == (_Outer(), [])
    assert outer(later=8) == (BAD, ["later: is not available yet in this version; fix: leave it out"])


def test_a_kind_may_be_the_key_of_what_its_node_needs():
    report = Report()
    hint = Speculation | None

    def made(held):
        return convert(hint, wrapped(held), "key", report)

    assert made({"draft": "m"}) == DraftModel(model="m") == made({"kind": "draft", "model": "m"})
    assert made({"early_exit": 3, "tokens": 2}) == EarlyExit(layers=3, tokens=2) and not report.problems
    assert made({"draft": "m", "early_exit": 3}) is BAD and made({"draft": "m", "kind": "draft"}) is BAD
    assert [str(problem).partition(";")[0] for problem in report.problems] == [
        "key.early_exit: unknown key",
        "key.draft: unknown key",
        "key.model: is missing",
    ]
    assert made({"early_exit": 0}) is BAD and str(report.problems[-1]).startswith("key.layers: 0 is out of range")


def test_contradictions_are_told_beside_other_problems_but_not_of_fields_that_are_wrong_themselves():
    said = outer(inner={"a": 9, "b": 3, "c": 1})[1]
    assert said == [
        "inner.c: unknown key; fix: use one of kind, a, b",
        "inner.a: contradicts inner.b: is the larger; fix: swap them",
    ]
    assert outer(inner={"a": 0, "b": -1})[1] == ["inner.a: 0 is out of range; fix: give a value at least 1"]
    assert outer(inner={"a": 2, "b": 3}) == (_Outer(inner=_Inner(a=2, b=3)), [])


@pytest.mark.parametrize(
    ("hint", "text", "made"),
    [
        (float, "2e-5", 2e-5),
        (float, "1_000", 1000.0),
        (float, "-.5", -0.5),
        (float, "012", BAD),
        (float, ".nan", BAD),
        (float, "1e999", BAD),
        (float, "1:30", BAD),
        (int, "1_000", 1000),
        (int, "0", 0),
        (int, "0x10", BAD),
        (int, "010", BAD),
        (int, "1e3", BAD),
        (int, "٣", BAD),
        (bool, "true", True),
        (bool, "yes", BAD),
        (bool, "True", BAD),
        (str, "1e-5", "1e-5"),
        (str, "no", BAD),
        (str, "2024-01-02", BAD),
        (int | None, "~", None),
        (int | None, "", None),
        (Literal["a", "b"], "b", "b"),
        (Literal["a", "b"], "c", BAD),
        (Duration, "1.5h", 5400.0),
        (Duration, "10x", BAD),
        (Size, "2GB", 2 * 10**9),
    ],
)
def test_r5_text_is_read_by_the_type_that_waits_for_it(hint, text, made):
    got, said = read(hint, text)
    assert got is BAD if made is BAD else (got == made and type(got) is type(made))
    assert bool(said) == (made is BAD) and all("r.yaml:1:1: key: " in line and "; fix: " in line for line in said)


def test_r5_quotes_make_text_and_the_environment_gives_either():
    assert read(str, "no", quoted=True)[0] == "no"
    assert read(int, "3", quoted=True) == (
        BAD,
        ["r.yaml:1:1: key: '3' is not a whole number; fix: take the quotes away"],
    )
    asked = Origin("file", "r.yaml", 1, 1, "${env:N}")
    report = Report()
    assert convert(int, Value("3", asked, quoted=True), "n", report) == 3
    assert convert(str, Value("no", asked, quoted=False), "n", report) == "no" and not report.problems
    convert(int, Value("s3cret", asked), "n", report)
    assert "${env:N} is not a whole number" in str(report.problems[0]) and "s3cret" not in str(report.problems[0])


WORDS = st.sampled_from(
    ["kind", "sft", "merge", "lora", "none", "model", "data", "train", "jsonl", "adapter", "rank", "optim", "out", "no"]
)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_whatever_is_written_gives_a_node_or_problems(tree):
    report = Report()
    made = convert(Stage, wrapped(tree), "", report)
    assert (made is BAD) == bool(report.problems)
    assert all(p.what and p.fix and "\n" not in str(p) for p in report.problems)


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**30), 10**30))
def test_numbers_come_back_as_written(number, whole):
    assert read(float, repr(number))[0] == number
    assert read(int, str(whole))[0] == whole


def test_limits_hold_for_each_member_of_a_union():
    assert Checkpointing(every="10m").every == 600.0 and Checkpointing(every=5).every == 5
    for wrong in (0, -1, "0s"):
        assert "out of range" in refused(lambda wrong=wrong: Checkpointing(every=wrong))[0]


def test_nodes_are_frozen_and_compare_by_value():
    assert Nf4() == Nf4(double=True) and hash(Nf4()) == hash(Nf4(double=True))
    with pytest.raises(AttributeError):
        Nf4().double = False
