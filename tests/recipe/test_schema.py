"""The schema says yes to what the loader takes, and no to what it refuses, on the shipped recipes and their faults."""

import json
import re

import pytest
import yaml

from llmkit.core.errors import RecipeError
from llmkit.recipe.describe import docs, markdown
from llmkit.recipe.load import load_recipe
from llmkit.recipe.schema import schema
from llmkit.recipe.shipped import recipes
from llmkit.stages.sft import Sft

SHIPPED = list(recipes().values())
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def fits(value, rule, root):
    """A small judge of the words that our schema uses."""
    if isinstance(rule, bool):
        return rule
    checks = {
        "$ref": lambda name: fits(value, root["$defs"][name.rpartition("/")[2]], root),
        "type": lambda name: _is(value, name),
        "const": lambda fixed: value == fixed and type(value) is type(fixed),
        "enum": lambda names: value in names,
        "anyOf": lambda rules: any(fits(value, one, root) for one in rules),
        "required": lambda names: not isinstance(value, dict) or set(names) <= set(value),
        "properties": lambda rules: (
            not isinstance(value, dict)
            or all(fits(value[name], one, root) for name, one in rules.items() if name in value)
        ),
        "items": lambda one: not isinstance(value, list) or all(fits(item, one, root) for item in value),
        "minItems": lambda least: not isinstance(value, list) or len(value) >= least,
        "pattern": lambda text: not isinstance(value, str) or re.search(text, value) is not None,
        "propertyNames": lambda one: not isinstance(value, dict) or all(fits(name, one, root) for name in value),
        "minimum": lambda least: not _number(value) or value >= least,
        "maximum": lambda most: not _number(value) or value <= most,
        "exclusiveMinimum": lambda least: not _number(value) or value > least,
        "exclusiveMaximum": lambda most: not _number(value) or value < most,
        "additionalProperties": lambda one: (
            not isinstance(value, dict)
            or all(fits(item, one, root) for name, item in value.items() if name not in rule.get("properties", {}))
        ),
    }
    spoken = set(rule) - {"$schema", "title", "description", "default", "$defs"}
    assert spoken <= set(checks), spoken - set(checks)
    return all(checks[word](rule[word]) for word in spoken)


def _number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is(value, name):
    if name in ("number", "integer"):
        return _number(value) and (name == "number" or isinstance(value, int))
    return isinstance(value, KINDS[name])


def tree(text):
    """A recipe as an editor reads it: YAML 1.2 takes 1e-3 for a number."""
    said = json.dumps(yaml.safe_load(text))
    return json.loads(re.sub(r'"([0-9.]+e-?[0-9]+)"', r"\1", said))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_fit_and_a_misspelt_key_does_not(path):
    root, said = schema(), tree(path.read_text())
    assert fits(said, root, root)
    assert not fits({**said, "sed": 1}, root, root)


@pytest.mark.parametrize(
    ("change", "fine"),
    [
        ({}, True),
        ({"adapter": "none", "checkpoint": {"every": "10m"}, "seed": "${env:SEED}"}, True),
        ({"model": {"name": "x", "attention": "sdpa"}}, True),
        ({"adapter": {"kind": "lora", "rank": 0}}, False),
        ({"adapter": {"rank": 8}, "schedule": {"warmup": 0.1}}, True),
        ({"quant": {"double": True}}, False),
        ({"optim": {"kind": "adamw", "lrr": 1}}, False),
        ({"parallel": {"tensor": 2}}, True),
        ({"parallel": {"expert": 0}}, False),
        ({"precision": "bf61"}, False),
        ({"kind": "dpo", "loss": {"beta": 0.2}}, True),
        ({"kind": "grpo"}, False),
        ({"name": "x"}, False),
    ],
)
def test_the_schema_agrees_with_the_loader(change, fine, write, monkeypatch):
    monkeypatch.setenv("SEED", "3")
    said = {"kind": "sft", "model": "x", "data": {"train": [{"kind": "jsonl", "path": "a"}]}, "out": "o", **change}
    root = schema()
    assert fits(said, root, root) is fine
    name = write(json.dumps(said))
    if fine:
        load_recipe(name)
    else:
        with pytest.raises(RecipeError):
            load_recipe(name)


@pytest.mark.parametrize(
    ("drafts", "fine"),
    [
        ("ngram", True),
        ("draft", True),  # a word is a kind; that its node needs more the loader tells
        ({"draft": "m", "tokens": 3}, True),
        ({"kind": "early_exit", "layers": 2}, True),
        ({"early_exit": 2}, True),
        ({"early_exit": 0}, False),
        ({"draft": "m", "layers": 2}, False),
        ({"tokens": 2}, False),
        ("oracle", False),
        (None, True),
    ],
)
def test_what_drafts_may_be_the_key_of_what_it_needs(drafts, fine, write):
    said = {"kind": "serve", "model": "x", "out": "o", "engine": {"speculation": drafts}}
    root = schema()
    assert fits(said, root, root) is fine
    if drafts == "draft" or not fine:
        with pytest.raises(RecipeError):
            load_recipe(write(json.dumps(said)))
    else:
        load_recipe(write(json.dumps(said)))


def test_what_is_extended_may_bring_what_is_required():
    root = schema()
    assert fits({"extends": "base.yaml", "seed": 1}, root, root) and not fits({"seed": 1}, root, root)


def test_the_lines_below_fields_become_their_description():
    assert docs(Sft)["out"] == "The run's folder."
    assert schema()["$defs"]["Sft"]["properties"]["out"]["description"] == "The run's folder."
    assert "| `out` | text | required | The run's folder. |" in markdown(Sft)
