"""What a recipe's nodes hold, found by its class."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from llmkit.core.convert import under


def each(node: Any, kinds: tuple[type, ...], key: str = "") -> Iterator[tuple[str, Any]]:
    """Key and value of all in a stage that is of some kinds; nothing is looked for within it."""
    if isinstance(node, kinds):
        yield key, node
    elif isinstance(node, tuple):
        for index, item in enumerate(node):
            yield from each(item, kinds, under(key, str(index)))
    elif dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            yield from each(getattr(node, field.name), kinds, under(key, field.name))
