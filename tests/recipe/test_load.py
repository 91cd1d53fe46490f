"""Recipes: places, nearest keys, all errors at once, and the rows R1 to R10 of bad input."""

import dataclasses
import os
import subprocess
import sys
import textwrap
import time
import tracemalloc

import pytest

from llmkit.core.errors import RecipeError
from llmkit.recipe.kinds import KINDS
from llmkit.recipe.load import digest, load_recipe
from llmkit.recipe.show import resolved
from llmkit.stages.sft import Sft

GOOD = """
kind: sft
model: tiny
data:
  train: [{kind: jsonl, path: a.jsonl}]
optim: {kind: adamw, lr: 2e-5}
out: runs/x
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text, name="r.yaml"):
    from pathlib import Path

    raw = text if isinstance(text, bytes) else textwrap.dedent(text).encode()
    Path(name).write_bytes(raw)
    return name


def problems(text, overrides=(), name="r.yaml"):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text, name), overrides)
    return [str(p) for p in caught.value.problems]


def test_a_good_recipe_is_typed_and_knows_where_every_value_was_written():
    recipe = load_recipe(write(GOOD), ["optim.lr=1e-4", "steps=10"])
    ((name, node),) = recipe.stages
    assert name == "" and node.optim.lr == 1e-4 and node.steps == 10 and node.model.name == "tiny"
    assert str(recipe.origins["model"]) == "r.yaml:3"
    assert recipe.origins["optim.lr"].kind == "command line"
    assert recipe.origins["seed"].kind == "default"


def test_r1_every_unknown_key_at_once_with_line_and_nearest():
    said = problems(GOOD.replace("lr: 2e-5", "learing_rate: 1").replace("out:", "ouut:") + "optim.x: 1\n")
    assert any("r.yaml:6:22: optim.learing_rate: unknown key" in p for p in said)
    assert any("ouut: unknown key, did you mean out?" in p for p in said)
    assert len(said) >= 3


def test_r2_a_key_written_twice_names_both_lines():
    assert problems(GOOD + "seed: 1\nseed: 2\n") == [
        "r.yaml:9:1: seed: is written twice, first in line 8; fix: keep one of the two"
    ]


def test_r4_bombs_are_refused_fast_and_small():
    bombs = {
        "aliases": "a: &a [1,1]\n" + "".join(f"b{i}: [{', '.join(['*a'] * 9)}]\n" for i in range(9)),
        "depth": "a: " + "[" * 10000 + "]" * 10000,
        "size": "a: " + "x" * (50 << 20),
        "nodes": "a: [" + "1," * 200_000 + "1]",
        "keys": "kind: sft\n" + "\n".join(f"learing_rate{i}: 1" for i in range(9_000)),
    }
    for text in bombs.values():
        path, began = write(text), time.monotonic()
        tracemalloc.start()
        with pytest.raises(RecipeError):
            load_recipe(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100 << 20
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seed: 012", "octal or decimal"),
        ("seed: '3'", "take the quotes away"),
        ("deterministic: yes", "is not true or false"),
        ("out: no", "quote it"),
        ("out: on", "quote it"),
        ("out: 2024-01-02", "quote it"),
        ("seed: -1", "give a value at least 0"),
        ("steps: 1.5", "is not a whole number"),
        ("precision: bf61", "fix: use bf16"),
        ("checkpoint: {every: 10x}", "is not"),
    ],
)
def test_r5_scalars_are_read_by_the_type_of_their_field(line, said):
    text = "\n".join(row for row in GOOD.splitlines() if not row.startswith(line.split(":")[0])) + f"\n{line}\n"
    assert any(said in p and "r.yaml:" in p for p in problems(text))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("model:", "model.name: is empty; fix: give a value"),
        ("model: ''", "model.name: is empty; fix: give a value"),
        ("out:", "out: is empty; fix: give a value"),
        ("out: ''", "out: is empty; fix: give a value"),
        ("steps: ''", "steps: '' is not a whole number; fix: use a whole number"),
        ("model: [a]", "model: a list is not a name | a mapping; fix: use a name | a mapping"),
        ("data: {train: a.jsonl}", "a.jsonl is not a list; fix: write [{kind: jsonl, path: a.jsonl}]"),
        ("data: {train: [a.jsonl]}", "a.jsonl is no kind of train; fix: write {kind: jsonl, path: a.jsonl}"),
        ("data: {train: {kind: jsonl}}", "a mapping is not a list; fix: write [...] around it"),
        ("log: tensorboard", "tensorboard is not a list; fix: write [tensorboard]"),
        ("checkpoint: {every: 10x}", "10x is not a whole number | a duration such as 10m"),
    ],
)
def test_what_is_wrong_is_said_with_a_way_that_leads_out(line, said):
    key = line.split(":")[0]
    tree = {row.split(":")[0]: row for row in GOOD.replace("data:\n  ", "data: {").replace("}]\n", "}]}\n").split("\n")}
    assert any(said in problem for problem in problems("\n".join((tree | {key: line}).values())))


def test_python_values_are_named_as_a_recipe_writes_them():
    with pytest.raises(RecipeError) as caught:
        Sft(model=None, data={"train": "a.jsonl"}, out="", steps=True)
    said = str(caught.value)
    assert "model: null is" in said and "steps: true is" in said and "out: is empty" in said and "None" not in said


def test_r5_numbers_without_a_dot_and_with_units_are_numbers():
    recipe = load_recipe(write(GOOD + "checkpoint: {every: 10m}\nsteps: 1_000\nadapter: {kind: lora, alpha: 16}\n"))
    node = recipe.stages[0][1]
    assert node.optim.lr == 2e-5 and node.steps == 1000
    assert node.checkpoint.every == 600.0 and isinstance(node.checkpoint.every, float)
    assert isinstance(node.adapter.alpha, float)


def test_r7_contradictions_name_both_keys_and_lines():
    said = problems(GOOD + "quant: bnb_nf4\nadapter: none\nepochs: 1\nsteps: 2\ncheckpoint: {best: valid.loss}\n")
    assert any(p.startswith("r.yaml:8:8: quant.kind: contradicts adapter.kind (line 9)") for p in said)
    assert any(p.startswith("r.yaml:10:9: epochs: contradicts steps (line 11)") for p in said)
    assert any("checkpoint.best: contradicts data.valid (line 5)" in p for p in said)
    assert any("checkpoint.best: contradicts evaluate.every (default)" in p for p in said)
    control = load_recipe(write(GOOD + "quant: bnb_nf4\nsteps: 2\n"))
    assert control.stages[0][1].quant.kind == "bnb_nf4"


def test_r8_environment_interpolation_and_its_secrecy(monkeypatch):
    text = GOOD.replace("model: tiny", "model: ${env:WHICH}")
    assert "the environment has no WHICH" in problems(text)[0]
    monkeypatch.setenv("WHICH", "s3cret")
    recipe = load_recipe(write(text))
    assert recipe.stages[0][1].model.name == "s3cret"
    assert "s3cret" not in resolved(recipe) and "${env:WHICH}" in resolved(recipe)


def test_r8_extends_merges_replaces_and_refuses_circles_and_escapes(tmp_path):
    write(GOOD, "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\noptim: {lr: 3e-5}\nschedule: {kind: linear}\n", "child.yaml"))
    node = recipe.stages[0][1]
    assert node.optim.lr == 3e-5 and node.schedule.kind == "linear" and node.model.name == "tiny"
    assert str(recipe.origins["out"]) == "base.yaml:7"
    write("extends: b.yaml\n", "a.yaml")
    assert "circle: b.yaml -> a.yaml -> b.yaml" in problems("extends: a.yaml\n", name="b.yaml")[0]
    assert "outside" in problems("extends: /etc/passwd\n")[0]
    assert "does not exist" in problems("extends: nothing.yaml\n")[0]


def test_another_kind_replaces_a_mapping_and_lists_replace():
    write(GOOD + "quant: {kind: bnb_int8, threshold: 1}\n", "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nquant: {kind: bnb_nf4}\n", "c.yaml"))
    assert recipe.stages[0][1].quant.kind == "bnb_nf4"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- 1\n", "no mapping at the top"),
        (b"a: 1\n---\nb: 2\n", "two documents"),
        (b"a:\n\t- 1\n", "tabs"),
        (b"a: \xff\n", "not UTF-8"),
        (b"a: b\x00c\n", "U+0000"),
        ("a: \u202eb\n".encode(), "U+202E"),
        ("\u0430: 1\n".encode(), "outside ASCII"),
        (b"a: !!python/object:os.system 1\n", "tag"),
        (b"a: [1\n", "r.yaml:2"),
    ],
)
def test_r10_odd_files(raw, said):
    made = problems(raw)
    assert any(said in line for line in made)
    assert all(line.startswith("r.yaml:") and "\n" not in line for line in made)


@pytest.mark.parametrize(
    "overrides", [["optim.lr=1e-4", "adapter.dora=true"], ["optim={lr: 1e-4}", "adapter={dora: true}"]]
)
def test_a_mapping_without_a_kind_is_of_the_default_kind(overrides):
    recipe = load_recipe(write(GOOD.replace("optim: {kind: adamw, lr: 2e-5}\n", "")), overrides)
    node = recipe.stages[0][1]
    assert (node.optim.kind, node.optim.lr, node.adapter.kind, node.adapter.dora) == ("adamw", 1e-4, "lora", True)
    assert recipe.origins["optim.kind"].kind == "default"


def test_what_is_wrong_below_a_default_kind_is_told_at_once():
    said = problems(GOOD.replace("kind: adamw, lr: 2e-5", "lr: -1, beta1: 1.5, bta: 1"))
    assert [line.split(": ")[1] for line in said] == ["optim.lr", "optim.beta1", "optim.bta"]


@pytest.mark.parametrize("cls", KINDS.values())
def test_the_default_of_a_node_is_what_its_kind_alone_gives(cls):
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(item.default):
            assert item.default == type(item.default)(), item.name


def test_r10_bom_and_crlf_are_fine():
    load_recipe(write(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()))


def test_what_comes_later_is_refused_and_not_ignored():
    said = problems(GOOD + "quant: {kind: w8a8}\nprecision: {reduce: bf16}\n")
    assert sum("not available yet" in p for p in said) == 2
    assert "not available yet" in problems(GOOD.replace("kind: sft", "kind: monitor"))[0]
    load_recipe(write(GOOD + "parallel: {tensor: 1, strategy: single}\n"))


PIPE = """
out: runs/p
defaults: {model: tiny, seed: 3}
stages:
  - {name: tune, kind: sft, data: {train: [{kind: jsonl, path: a.jsonl}]}}
  - {name: fold, kind: merge, model: "${stages.tune}"}
"""


def test_pipelines_share_defaults_link_stages_and_take_overrides_by_name():
    recipe = load_recipe(write(PIPE), ["stages.tune.steps=10", "stages.fold.precision=bf16"])
    (_, tune), (_, fold) = recipe.stages
    assert (tune.steps, tune.seed, fold.seed, tune.model.name) == (10, 3, 3, "tiny")
    assert fold.model.name == tune.out == "runs/p/tune" and fold.precision == "bf16"
    assert "no earlier stage is called nobody" in problems(PIPE.replace("stages.tune}", "stages.nobody}"))[0]
    assert "a second stage is called tune" in problems(PIPE.replace("name: fold", "name: tune"))[0]


def test_overrides_that_name_nothing_are_errors():
    assert "no override" in problems(GOOD, ["optim.lr"])[0]
    assert "unknown key" in problems(GOOD, ["optim.lrr=1"])[0]
    assert "there is no 7; fix: use one of 0" in problems(GOOD, ["data.train.7.path=x"])[0]


def test_the_digest_is_of_values_and_not_of_the_folder_or_the_layout():
    a = load_recipe(write(GOOD)).stages[0][1]
    b = load_recipe(write("# x\n" + GOOD), ["out=elsewhere"]).stages[0][1]
    c = load_recipe(write(GOOD), ["seed=9"]).stages[0][1]
    assert digest(a) == digest(b) != digest(c)


def test_the_resolved_recipe_reads_back_as_itself():
    first = load_recipe(write(GOOD), ["steps=7"])
    again = load_recipe(write(resolved(first), "again.yaml"))
    assert digest(first.stages[0][1]) == digest(again.stages[0][1])


BATTERY = """
import pathlib, sys
from llmkit.core.errors import RecipeError
from llmkit.recipe.load import load_recipe
for path in sorted(pathlib.Path().glob("*.yaml")):
    try:
        load_recipe(path)
        sys.stdout.write(f"{path} is sound\\n")
    except RecipeError as error:
        sys.stdout.write(f"{error}\\n")
"""


def test_m14_the_battery_says_the_same_without_asserts():
    texts = [
        GOOD,
        "",
        "- 1\n",
        "a: 1\na: 2\n",
        "a: &x 1\nb: *x\n",
        "a:\n\t- 1\n",
        "kind: dpo\n",
        "seed: -1\nsed: 1\n",
        PIPE,
    ]
    texts += [GOOD + "quant: bnb_nf4\nadapter: none\n", GOOD + "steps: 012\nlog: [x]\n", "a: !!x 1\n", "a: " + "[" * 99]
    for index, text in enumerate(texts):
        write(text, f"r{index:02}.yaml")
    said = [_battery({}), _battery({"PYTHONOPTIMIZE": "2"})]
    assert said[0] == said[1] and said[0].count("is sound") == 2 and len(said[0].splitlines()) > len(texts)


def _battery(more):
    done = subprocess.run(
        [sys.executable, "-c", BATTERY], capture_output=True, text=True, check=True, env={**os.environ, **more}
    )
    return done.stdout
