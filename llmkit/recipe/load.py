"""A recipe file, what it extends, and the command line's overrides, to typed stages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmkit.core.errors import RecipeError
from llmkit.core.scalars import Origin, Value
from llmkit.core.wording import Report
from llmkit.recipe.extend import extended
from llmkit.recipe.override import overridden
from llmkit.recipe.pipeline import ENV, each_text, read_stages


@dataclass(frozen=True)
class Recipe:
    """What a recipe says: its stages in order, and where every value came from."""

    stages: tuple[tuple[str, Any], ...]
    """(name, node); one stage at the top level has the name ''."""
    origins: Mapping[str, Origin]
    """By dotted key, below `stages.NAME` in a pipeline."""
    text: str = ""
    """As written."""

    @property
    def out(self) -> Path:
        """The folder that holds the whole run."""
        name, node = self.stages[0]
        return Path(node.out).parent if name else Path(node.out)

    @property
    def digest(self) -> str:
        """sha256 of all that the stages say, but where they put it."""
        said = json.dumps([[name, digest(node)] for name, node in self.stages])
        return hashlib.sha256(said.encode()).hexdigest()


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """The recipe of a file with `key.path=value` overrides, a mapping or a list of texts.

    Raises:
        RecipeError: with every problem of the recipe, each with its file and line.
    """
    path, report = Path(path), Report()
    tree = extended(path, report)
    tree = overridden(tree, overrides, report)
    tree = each_text(tree, lambda value, key: _from_environment(value, key, report))
    stages = read_stages(tree, report)
    report.stop_if_bad()
    return Recipe(tuple(stages), report.origins, _as_written(path))


def _as_written(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as cause:
        raise RecipeError(f"cannot be read ({cause.strerror})", fix="leave it in its place", file=str(path)) from cause


def _from_environment(value: Value, key: str, report: Report) -> Value:
    """The value with each `${env:NAME}` read; what asked for it stays with its origin, to be shown and saved."""
    names = re.findall(ENV, value.held)
    for name in names:
        if name not in os.environ:
            report.add(f"the environment has no {name}", f"export {name}=...", key, value.origin)
    if not names:
        return value
    text = re.sub(ENV, lambda match: os.environ.get(match[1], ""), value.held)
    return replace(value, held=text, origin=replace(value.origin, written=value.held))


def digest(node: Any) -> str:
    """sha256 of a stage's values without `out`."""
    values = plain(node)
    values.pop("out", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def plain(node: Any) -> Any:
    """A node as JSON values."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {item.name: plain(getattr(node, item.name)) for item in dataclasses.fields(node)}
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    return [plain(item) for item in node] if isinstance(node, list | tuple) else node
