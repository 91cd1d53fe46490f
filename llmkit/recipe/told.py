"""Where in a recipe an error is about: what a stage says of its own keys, as the recipe names them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from llmkit.core.convert import under
from llmkit.core.errors import LlmkitError, Problem
from llmkit.core.scalars import Origin
from llmkit.recipe.load import Recipe


def problem(recipe: Recipe, name: str, key: str, what: str, fix: str) -> Problem:
    """What is wrong with a key of the stage `name`, with its place in the recipe."""
    return _placed(recipe, name, Problem(what, fix, key=key))


@contextmanager
def named(recipe: Recipe, name: str) -> Iterator[None]:
    """Inside, errors say of which stage they are, and where it says what they are about."""
    try:
        yield
    except LlmkitError as error:
        error.each(partial(_placed, recipe, name))
        raise


def _placed(recipe: Recipe, name: str, said: Problem) -> Problem:
    top = f"stages.{name}" if name else ""
    key = under(top, said.key) if said.key else top
    if said.file:
        return replace(said, key=key)
    origin = _nearest(recipe, key, top)
    return replace(said, key=key, file=origin.file, line=origin.line, column=origin.column)


def _nearest(recipe: Recipe, key: str, top: str) -> Origin:
    """Where a key is written, or what it is below; of a stage as a whole, nothing is told."""
    while key != top and not recipe.origins.get(key, Origin()).file:
        key = key.rpartition(".")[0]
    return recipe.origins.get(key, Origin()) if key != top else Origin()
