"""Overrides: their place in the tree, over bare words too, and their errors."""

from pathlib import Path

import pytest

from llmkit.recipe.load import load_recipe


def stage(write, text, overrides):
    return load_recipe(write(text), overrides).stages[0][1]


def test_an_override_below_a_bare_word_keeps_the_word(write, good):
    node = stage(write, good + "quant: bnb_nf4\n", ["model.attention=eager", "quant.double=false"])
    assert (node.model.name, node.model.attention) == ("tiny", "eager")
    assert (node.quant.kind, node.quant.double) == ("bnb_nf4", False)
    assert stage(write, good, ["model.name=other"]).model.name == "other"
    assert stage(write, good + "quant: bnb_nf4\n", ["quant.kind=bnb_int8"]).quant.kind == "bnb_int8"


def test_python_values_are_overrides_too(write, good):
    node = stage(
        write, good, {"optim": {"kind": "adamw", "lr": 1}, "data.train": [{"kind": "jsonl", "path": Path("b")}]}
    )
    assert node.optim.lr == 1.0 and node.data.train[0].path == "b"
    recipe = load_recipe(write(good), {"seed": 5})
    assert recipe.stages[0][1].seed == 5 and recipe.origins["seed"].kind == "python"


def test_of_two_overrides_of_one_key_the_later_wins(write, good):
    assert stage(write, good, ["steps=3", "steps=4"]).steps == 4


def test_lists_take_an_index_and_items_with_a_name_their_name(write, good, pipe):
    assert stage(write, good, ["data.train.0.path=b.jsonl"]).data.train[0].path == "b.jsonl"
    assert stage(write, pipe, ["stages.tune.steps=4", "stages.0.seed=9"]).steps == 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("x", "'x' is no override; fix: write key.path=value"),
        ("a.=1", "'a.=1' is no override"),
        ("optim.lr=[1", "optim.lr: '[1' cannot be read"),
        ("model=*x", "model: '*x' cannot be read (uses the alias *x)"),
        ("batch.rowss=1", "batch.rowss: unknown key, did you mean rows?"),
        ("quant.double=true", "quant.kind: is missing; fix: add kind: bnb_nf4"),
        ("data.train.7.path=x", "data.train.7.path: there is no 7; fix: use one of 0"),
        ("stages.a.steps=1", "stages.a.steps: the recipe has no stages"),
        ("seed=", "seed: nothing is not a whole number"),
        ("out.x=1", "out: a mapping is not text"),
        ("steps=no", "steps: no is not a whole number"),
        ("model=\udcff", "cannot be read"),
    ],
)
def test_overrides_that_cannot_be_are_told_with_their_key(override, said, problems, good):
    assert any(said in line for line in problems(good, [override]))


def test_every_wrong_override_is_told_at_once_with_the_recipes_own_faults(problems, good):
    said = problems(good + "sed: 1\n", ["x", "optim.lrr=1", "steps=0"])
    assert len(said) == 4


def test_a_batch_in_another_unit_replaces_the_one_below_it_in_a_stage_and_nowhere_else(write, pipe):
    """A batch of a stage is said by one key; any other mapping of that name merges."""
    text = pipe.replace("seed: 3", "batch: {tokens: 64}")
    words = ("defaults.batch={rows: 4}", "stages.tune.batch={rows: 4}")
    read = [load_recipe(write(text), [one]).stages[0][1] for one in words]
    read += [load_recipe(write(text.replace("kind: sft", "kind: sft, batch: {rows: 4}"))).stages[0][1]]
    assert [(node.batch.rows, node.batch.tokens) for node in read] == [(4, None)] * 3
    trl = "kind: trl\ntrainer: DPOTrainer\nmodel: tiny\ndata: {train: [{kind: jsonl, path: a.jsonl}]}\nout: x\n"
    node = load_recipe(write(trl + "arguments: {batch: {a: 1}}\n"), ["arguments.batch={b: 2}"]).stages[0][1]
    assert node.arguments["batch"] == {"a": 1, "b": 2}
    write(trl + "arguments: {batch: {a: 1}}\n", "base.yaml")
    assert load_recipe(write("extends: base.yaml\narguments: {batch: {b: 2}}\n")).stages[0][1] == node
