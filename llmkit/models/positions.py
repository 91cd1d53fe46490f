"""How long a sequence a model takes, from its files alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmkit.core.errors import RecipeError
from llmkit.models.resolve import Resolved
from llmkit.models.safe import check_folder, read_json

LEARNED = re.compile(r"(^|\.)(wpe|\w*positions?_?\w*)\.weight$")
"""Names of tables of learned positions."""
TABLES = ("codegen", "gptj")
"""Families whose rotations are a table of as many rows as there are positions."""


def check_length(resolved: Resolved, length: int, key: str) -> str:
    """A notice where sequences of `length` go past what the model was made for; empty where they do not.

    Raises:
        RecipeError: it has no more positions at all.
    """
    base = resolved.base or resolved
    said = read_json(base.folder / "config.json")
    text = said.get("text_config") or said
    name = next((name for name in ("max_position_embeddings", "n_positions") if isinstance(text.get(name), int)), "")
    if not name or length <= text[name]:
        return ""
    what = f"{length} is more than the {text[name]} positions of {base.name} ({name})"
    if text.get("model_type") in TABLES or _table(base):
        raise RecipeError(what, fix=f"set {key}={text[name]}", key=key)
    return f"{key}: {what}; its RoPE goes on, untrained there"


def _table(base: Resolved) -> bool:
    headers: Mapping[str, Mapping[str, Any]] = check_folder(base.folder)
    return any(
        LEARNED.search(name) and len(item["shape"]) == 2 for header in headers.values() for name, item in header.items()
    )
