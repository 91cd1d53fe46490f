"""Rows that several ranks hold: whether a model can be trained so, and by which method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from llmkit.core.errors import ModelError
from llmkit.models.load import Loaded
from llmkit.parallel.context import Method, splitter
from llmkit.parallel.grid import Grid
from llmkit.parallel.steps import Parts


def by_context(parts: Parts, loaded: Loaded, asked: Literal["auto", "ulysses", "ring"], grid: Grid | None) -> Parts:
    """Parts whose micro-batches are dealt to the ranks along `context`; as they were where there is one.

    Raises:
        ModelError: the model cannot be trained on parts of rows.
    """
    if grid is None or grid.degrees.context == 1:
        return parts
    if why := _lacks(loaded):
        raise ModelError(why, fix="set parallel.context=1", key="parallel.context")
    method = chosen(loaded.model.config, asked, grid.degrees.context, grid.degrees.tensor)
    return replace(parts, ways=replace(parts.ways, split=splitter(grid, method)))


def chosen(config: Any, asked: Literal["auto", "ulysses", "ring"], context: int, tensor: int = 1) -> Method:
    """The method: `auto` deals heads out where they divide.

    Raises:
        ModelError: heads that do not divide were to be dealt.
    """
    odd = next((n for n in _heads(config) if n % (context * tensor)), 0)
    if asked == "ulysses" and odd:
        raise ModelError(
            f"ulysses deals {odd} attention heads to {context * tensor} ranks, which do not divide them",
            fix="set parallel.context_method=ring",
            key="parallel.context_method",
        )
    return asked if asked != "auto" else "ring" if odd else "ulysses"


def _heads(config: Any) -> list[int]:
    """Query heads, of each kind of layer."""
    text = config.get_text_config()
    several = getattr(text, "is_heterogeneous", False)
    return [int(part.num_attention_heads) for part in (text.per_layer_config if several else [text])]


def _lacks(loaded: Loaded) -> str:
    config = loaded.model.config.get_text_config()
    if not loaded.support.packed:
        return loaded.support.reason
    return "attention dropout would be drawn anew by every rank" if getattr(config, "attention_dropout", 0.0) else ""
