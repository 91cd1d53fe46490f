"""A recipe as resolved: every value with where it came from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llmkit.core.convert import under
from llmkit.core.errors import LlmkitError
from llmkit.core.scalars import AMBIGUOUS, Origin
from llmkit.parallel.node import Zero
from llmkit.recipe.load import Recipe, plain
from llmkit.recipe.pipeline import ENV
from llmkit.stages.training import Training

SHORTEST = 4
"""Letters of a value that is hidden in errors: a shorter one is no secret, and would be found in every other word."""


def resolved(recipe: Recipe, only: str | None = None) -> str:
    """The resolved recipe as YAML that can be run again, or its stage `only`; the origin of each value is a comment.

    What was read from the environment is shown as written.
    """
    tree, prefix = values(recipe), ""
    if only:
        tree, prefix = stage_values(recipe, only), f"stages.{only}"
    return "\n".join(_lines(tree, prefix, 0, recipe.origins)) + "\n"


def values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON values: one stage, or the list of them."""
    if not recipe.stages[0][0]:
        return stage_values(recipe, "")
    stages = []
    for name, _ in recipe.stages:
        own = stage_values(recipe, name)
        own.pop("out")  # follows from the folder of the pipeline
        stages.append({"name": name, **own})
    return {"out": _shown(str(recipe.out), "out", recipe.origins), "stages": stages}


def deepspeed(recipe: Recipe) -> dict[str, Any]:
    """The DeepSpeed configuration of each stage whose strategy is zero, by the stage's name."""
    found = {name: node for name, node in recipe.stages if isinstance(node, Training)}
    return {
        name: node.parallel.strategy.settings(node.types_name)
        for name, node in found.items()
        if isinstance(node.parallel.strategy, Zero)
    }


def stage_values(recipe: Recipe, name: str) -> dict[str, Any]:
    """One stage as JSON values, with `${env:NAME}` in place of what the environment held."""
    made: dict[str, Any] = _shown(plain(dict(recipe.stages)[name]), f"stages.{name}" if name else "", recipe.origins)
    return made


def _shown(value: Any, key: str, origins: Mapping[str, Origin]) -> Any:
    if isinstance(value, Mapping):
        return {name: _shown(inner, f"{key}.{name}" if key else name, origins) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shown(item, f"{key}.{index}", origins) for index, item in enumerate(value)]
    origin = origins.get(key)
    return origin.written if origin is not None and origin.written else value


def environment(recipe: Recipe, name: str) -> dict[str, str]:
    """By key of a stage, what it took from the environment: as written, with a digest that tells of a change."""
    held, shown = leaves(plain(dict(recipe.stages)[name])), leaves(stage_values(recipe, name))
    return {
        key: f"{shown[key]} ({hashlib.sha256(str(value).encode()).hexdigest()[:8]})"  # too short to be a value's proof
        for key, value in held.items()
        if key != "out" and re.search(ENV, str(shown[key]))
    }


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Every value of a tree of JSON values that is no mapping and no list, by its dotted key."""
    if isinstance(value, Mapping | list):
        inner = value.items() if isinstance(value, Mapping) else ((str(i), item) for i, item in enumerate(value))
        return {path: leaf for name, item in inner for path, leaf in leaves(item, under(key, name)).items()}
    return {key: value}


@contextmanager
def environment_hidden(recipe: Recipe) -> Iterator[None]:
    """Errors name `${env:NAME}` in place of what the environment held, as all that is saved does."""
    try:
        yield
    except LlmkitError as error:
        for held, shown in _secrets(recipe):
            error.hide(held, shown)
        raise


def hide_environment(recipe: Recipe, text: str) -> str:
    """`text` with `${env:NAME}` in place of what the environment held."""
    for held, shown in _secrets(recipe):
        text = text.replace(held, shown)
    return text


def _secrets(recipe: Recipe) -> list[tuple[str, str]]:
    """What the environment held, and what stands for it; the longest first, for one may be a part of another."""
    names = {name for origin in recipe.origins.values() for name in re.findall(ENV, origin.written)}
    held = [(os.environ.get(name, ""), f"${{env:{name}}}") for name in sorted(names)]
    return sorted((pair for pair in held if len(pair[0]) >= SHORTEST), key=lambda pair: -len(pair[0]))


def _lines(tree: Mapping[str, Any], key: str, depth: int, origins: Mapping[str, Origin]) -> list[str]:
    """The lines of a mapping; a list of mappings has a line for each of their values too."""
    made: list[str] = []
    for name, value in tree.items():
        path, pad = f"{key}.{name}" if key else name, "  " * depth
        if isinstance(value, Mapping) and value:
            made += [f"{pad}{_scalar(name)}:", *_lines(value, path, depth + 1, origins)]
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            made.append(f"{pad}{_scalar(name)}:")
            for index, item in enumerate(value):
                inner = f"{path}.{item['name'] if path == 'stages' else index}"
                first, *rest = _lines(item, inner, depth + 2, origins)
                made += [f"{pad}  - {first.lstrip()}", *rest]
        else:
            made.append(f"{pad}{_scalar(name)}: {_scalar(value)}  # {origins.get(path, 'default')}")
    return made


def _scalar(value: Any) -> str:
    """A value on one line; text that could be read as anything else is quoted."""
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_scalar(key)}: {_scalar(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_./][\w./-]*", value, re.ASCII):
        return json.dumps(value) if value.lower() in AMBIGUOUS else value
    return json.dumps(value, ensure_ascii=False)
