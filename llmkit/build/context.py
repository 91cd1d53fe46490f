"""Rows that several ranks hold: whether a model can be trained so, and by which method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from llmkit.core.errors import ModelError
from llmkit.models.load import Loaded
from llmkit.parallel.context import Method, splitter
from llmkit.parallel.fits import check_context
from llmkit.parallel.grid import Grid
from llmkit.parallel.steps import Parts


def by_context(parts: Parts, loaded: Loaded, asked: Literal["auto", "ulysses", "ring"], grid: Grid | None) -> Parts:
    """Parts whose micro-batches are dealt to the ranks along `context`; as they were where there is one.

    Raises:
        ModelError: the model cannot be trained on parts of rows.
        RecipeError: its attention cannot be dealt as asked.
    """
    if grid is None or grid.degrees.context == 1:
        return parts
    if not loaded.support.packed:
        raise ModelError(loaded.support.reason, fix="set parallel.context=1", key="parallel.context")
    method = chosen(loaded.model.config, asked, grid.degrees.context, grid.degrees.tensor)
    return replace(parts, ways=replace(parts.ways, split=splitter(grid, method)))


def chosen(config: Any, asked: Literal["auto", "ulysses", "ring"], context: int, tensor: int = 1) -> Method:
    """The method: `auto` deals heads out where they divide.

    Raises:
        RecipeError: heads that do not divide were to be dealt, or attention has dropout.
    """
    heads, said = _heads(config), config.get_text_config().to_dict()
    for n in heads:
        check_context({**said, "num_attention_heads": n}, asked, context, tensor)
    if asked == "auto":
        return "ring" if any(n % (context * tensor) for n in heads) else "ulysses"
    return asked


def _heads(config: Any) -> list[int]:
    """Query heads, of each kind of layer."""
    text = config.get_text_config()
    several = getattr(text, "is_heterogeneous", False)
    return [int(part.num_attention_heads) for part in (text.per_layer_config if several else [text])]
