"""Recipes written into an empty folder."""

import textwrap
from pathlib import Path

import pytest

from llmkit.core.errors import RecipeError
from llmkit.recipe.load import load_recipe

GOOD = """
kind: sft
model: tiny
data:
  train: [{kind: jsonl, path: a.jsonl}]
out: runs/x
"""
PIPE = """
out: runs/p
defaults: {model: tiny, seed: 3}
stages:
  - {name: tune, kind: sft, data: {train: [{kind: jsonl, path: a.jsonl}]}}
  - {name: fold, kind: merge, model: "${stages.tune}"}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a recipe and gives its name; the empty folder is the working folder."""
    monkeypatch.chdir(tmp_path)

    def written(text, name="r.yaml"):
        Path(name).write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return name

    return written


@pytest.fixture
def problems(write):
    """The problems of a recipe's text, as printed."""

    def told(text, overrides=(), name="r.yaml"):
        with pytest.raises(RecipeError) as caught:
            load_recipe(write(text, name), overrides)
        return [str(problem) for problem in caught.value.problems]

    return told


@pytest.fixture
def good():
    """One sound stage, in 6 lines after an empty one."""
    return GOOD


@pytest.fixture
def pipe():
    """Two sound stages."""
    return PIPE
