"""A recipe as resolved: every value with where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from llmkit.recipe.load import Recipe, plain


def resolved(recipe: Recipe, only: str | None = None) -> str:
    """The resolved recipe as YAML that can be run again; the origin of each value is a comment.

    What was read from the environment is shown as written.
    """
    lines: list[str] = []
    for name, node in recipe.stages:
        if only is not None and name != only:
            continue
        prefix = f"stages.{name}" if name else ""
        values = hidden(plain(node), prefix, recipe.shown)
        if name and only is None:
            lines.append(f"# stage {name}")
        lines += _lines(values, prefix, 0, recipe)
    return "\n".join(lines) + "\n"


def hidden(values: Any, key: str, shown: Mapping[str, str]) -> Any:
    """The values with `${env:NAME}` in place of what the environment held."""
    if isinstance(values, Mapping):
        return {k: hidden(v, f"{key}.{k}" if key else k, shown) for k, v in values.items()}
    if isinstance(values, list):
        return [hidden(v, f"{key}.{i}", shown) for i, v in enumerate(values)]
    found = shown.get(key) or next((text for path, text in shown.items() if key == f"{path}.name"), None)
    return values if found is None else found


def _lines(values: Mapping[str, Any], key: str, depth: int, recipe: Recipe) -> list[str]:
    made: list[str] = []
    for name, value in values.items():
        path = f"{key}.{name}" if key else name
        pad = "  " * depth
        if isinstance(value, Mapping) and value:
            made.append(f"{pad}{name}:")
            made += _lines(value, path, depth + 1, recipe)
            continue
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip()
        made.append(f"{pad}{name}: {text.removesuffix('...').strip()}  # {recipe.origins.get(path, 'default')}")
    return made
