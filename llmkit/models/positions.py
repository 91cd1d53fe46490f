"""How long a sequence a model takes, from its files alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmkit.core.errors import ModelError, RecipeError
from llmkit.core.types import Steady
from llmkit.models.resolve import Resolved
from llmkit.models.rope import RopeScaling, reach
from llmkit.models.safe import check_folder, read_json
from llmkit.models.scaled import scaled_config

LEARNED = re.compile(r"(^|\.)(wpe|\w*positions?_?\w*)\.weight$")
"""Names of tables of learned positions."""
NAMES = ("max_position_embeddings", "n_positions")
"""What configurations call how many positions there are."""
TABLES = ("codegen", "gptj")
"""Families whose rotations are a table of as many rows as there are positions."""


def steady_length(model: Any, most: int) -> int:
    """How long a sequence of a loaded model may grow, up to `most`, with its keys kept: there are no more positions, or
    RoPE turns all of a longer one anew (`dynamic`, `longrope`)."""
    there = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = min(most, int(there)) if there else most
    turning = [module for module in model.modules() if isinstance(module, Steady)]
    if all(module.steady(1, most) for module in turning):
        return most
    low, high = 1, most  # steady up to `low`, and not up to `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if all(module.steady(1, middle) for module in turning) else (low, middle)
    return low


def positions(resolved: Resolved, rope: RopeScaling | None = None) -> int:
    """Those that a model has, by its files, as they are scaled: the engine goes no further. 0 where none are said."""
    base = resolved.base or resolved
    said = read_json(base.folder / "config.json")
    rope = rope or resolved.rope
    if rope is not None and "auto_map" not in said:
        return int(getattr(_scaled(base, rope, said), "max_position_embeddings", 0) or 0)
    text = said.get("text_config") or said
    return next((text[name] for name in NAMES if isinstance(text.get(name), int)), 0)


def check_length(resolved: Resolved, length: int, key: str, rope: RopeScaling | None = None) -> str:
    """A notice where sequences of `length` go past what the model was made for, or is scaled to; empty where they do
    not. `rope` is the recipe's; without it an adapter's own counts.

    Raises:
        RecipeError: it has no more positions at all.
        ModelError: it cannot be scaled so.
    """
    base = resolved.base or resolved
    said = read_json(base.folder / "config.json")
    text = said.get("text_config") or said
    name = next((name for name in NAMES if isinstance(text.get(name), int)), "")
    rope = rope or resolved.rope
    there = _reach(base, rope, said) if rope is not None else text.get(name, 0)
    if not name or length <= there:
        return ""
    if rope is not None:
        return f"{key}: {length} is more than the {there} positions that RoPE `{rope.kind}` takes {base.name} to"
    what = f"{length} is more than the {there} positions of {base.name} ({name})"
    if text.get("model_type") in TABLES or _table(base):
        raise RecipeError(what, fix=f"set {key}={there}", key=key)
    return f"{key}: {what}; its RoPE goes on, untrained there"


def _reach(base: Resolved, rope: RopeScaling, said: Mapping[str, Any]) -> int:
    """The positions that a scaling goes to; code that the model brings is not run to know them."""
    if "auto_map" in said:
        return round(rope.factor * (rope.original_max_position_embeddings or said.get("max_position_embeddings", 0)))
    return reach(_scaled(base, rope, said), rope)


def _scaled(base: Resolved, rope: RopeScaling, said: Mapping[str, Any]) -> Any:
    try:
        return scaled_config(base, rope).get_text_config()
    except (ValueError, KeyError, OSError) as cause:
        kind = said.get("model_type", "no model_type")
        raise ModelError(f"{base.name} is of an unknown family ({kind})", fix="use a causal LM", key="model") from cause


def _table(base: Resolved) -> bool:
    headers: Mapping[str, Mapping[str, Any]] = check_folder(base.folder)
    return any(
        LEARNED.search(name) and len(item["shape"]) == 2 for header in headers.values() for name, item in header.items()
    )
