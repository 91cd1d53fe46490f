"""The verb `plan`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from llmkit.cli.recipes import out
from llmkit.core.environment import prepare
from llmkit.core.errors import RecipeError
from llmkit.core.memory import available
from llmkit.core.memory import device as here
from llmkit.core.ranks import ranks as launched
from llmkit.models.alias import is_remote
from llmkit.models.node import ModelRef
from llmkit.models.outline import PUBLIC
from llmkit.plan.devices import named
from llmkit.recipe.load import Recipe, load_recipe
from llmkit.recipe.told import named as placed
from llmkit.rl.asked_node import Model
from llmkit.stages.changes import changes
from llmkit.stages.planned import Planned, planned, shape_of
from llmkit.stages.training import Training


def plan(recipe: str, overrides: Sequence[str], device: str, world: int, as_json: bool) -> None:
    """Prints the plan of each stage that trains.

    Raises:
        LlmkitError: the recipe is not sound, or nothing in it is trained.
    """
    loaded = load_recipe(recipe, overrides)
    stages = [(name, node) for name, node in _begun(loaded) if isinstance(node, Training) and node.trained]
    if not stages:
        raise RecipeError("nothing here is trained", fix="give a recipe with a stage that trains")
    where = named(device).name if device else here()
    world = world or launched().world
    free = 0 if device else available(where) // (world if where == "cpu" else 1)
    prepare(remote=any(is_remote(node.model.name) and node.model.name not in PUBLIC for _, node in stages))
    made = dict[str, dict[str, Any]]()
    for name, node in stages:
        with placed(loaded, name):
            made[name] = _stage(name, node, where, world, free)
    if as_json:
        out(json.dumps(made.get("", made)))


def _begun(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Each stage; where a model of it is made by one before and is not there yet, with what that one began from, which
    has its shape."""
    first: dict[str, ModelRef] = {}
    for name, node in recipe.stages:
        given = _in_place(node, first)
        if isinstance(own := getattr(given, "model", None), ModelRef):
            first[node.out] = own
        yield name, given


def _in_place(value: Any, first: Mapping[str, ModelRef]) -> Any:
    """A stage, or what is in it, with what models began from in the place of those that are not there yet."""
    if isinstance(value, ModelRef):
        known = _to_be(value.name, first)
        return value if known is None else replace(value, name=known.name, revision=known.revision)
    if isinstance(value, Model):
        known = _to_be(value.path, first)
        return value if known is None else replace(value, path=known.name)
    if isinstance(value, tuple):
        return tuple(_in_place(one, first) for one in value)
    if not is_dataclass(value):
        return value
    held = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    made = {name: new for name, old in held.items() if (new := _in_place(old, first)) != old}
    return replace(cast(Any, value), **made) if made else value


def _to_be(name: str, first: Mapping[str, ModelRef]) -> ModelRef | None:
    """What a model began from that is still to be made."""
    return None if Path(name, "model").is_dir() else first.get(name)


def _stage(name: str, node: Training, where: str, world: int, free: int) -> dict[str, Any]:
    shape = shape_of(node)
    made = planned(node, where, world, free, shape)
    found = [] if made.fits else changes(node, where, world, made.free, shape)
    title = f"{name}: " if name else ""
    for line in made.lines():
        out(f"{title}{line}")
    if not made.fits:
        _tell(made, title, found)
    told = [{"set": one.keys, "cost": one.cost, "peak": one.peak} for one in found]
    return made.values() | ({} if made.fits else {"changes": told})


def _tell(made: Planned, title: str, found: Sequence[Any]) -> None:
    if not found:
        out(f"{title}no one or two changes make it fit: take a smaller model, or more devices")
    for one in found:
        out(f"{title}would fit with {one.keys}: {one.peak / 2**30:.2f} GiB; cost: {one.cost}")
