"""What the type hint of a field says: its members, its kinds, its marks, and how an error calls it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Hashable
from functools import cache
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from llmkit.core.config import Later, Unit

WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
MEASURES: dict[str, dict[Any, str]] = {
    "duration": {float: "a duration such as 10m"},
    "bytes": {int: "a size such as 4GiB"},
}
"""What the number with a unit is called, by its unit."""


def hints(cls: Any) -> dict[str, Any]:
    """The resolved type of each field."""
    return _hints(cls)


@cache
def _hints(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cast(Any, cls), include_extras=True)


def marks(hint: Any) -> tuple[tuple[str, ...], str]:
    """Names that come later, and the unit, of an annotated type and of the members of a union."""
    later: tuple[str, ...] = ()
    unit = ""
    if get_origin(hint) is Annotated:
        inner, *given = get_args(hint)
        later, unit = marks(inner)
        for mark in given:
            later += mark.names if isinstance(mark, Later) else ()
            unit = mark.name if isinstance(mark, Unit) else unit
    elif get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            more, inner_unit = marks(option)
            later, unit = later + more, unit or inner_unit
    return later, unit


def options(hint: Any) -> list[Any]:
    """The members of a union, flat."""
    if get_origin(hint) is Annotated:
        return options(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) for option in options(part)]
    return [hint]


def kind_of(node: Any) -> str:
    """The `kind` of a node's class, or nothing."""
    hint = hints(node).get("kind")
    return get_args(hint)[0] if hint is not None and get_origin(hint) is Literal else ""


def kinds(nodes: list[Any]) -> str:
    """The kinds of a union's nodes, as an error lists them."""
    return " | ".join(filter(None, map(kind_of, nodes))) or " | ".join(node.__name__ for node in nodes)


def names(hint: Any) -> str:
    """What a type is called in an error."""
    words = WORDS | MEASURES.get(marks(hint)[1], {})
    named: list[str] = []
    for option in options(hint):
        if get_origin(option) is Literal:
            named += [str(name) for name in get_args(option)]
        elif dataclasses.is_dataclass(option):
            named += [kind_of(option)] if kind_of(option) else [*_alone(option), "a mapping"]
        elif get_origin(option) is tuple:
            named.append("a list")
        elif option is not type(None):
            named.append(words.get(option, "a mapping"))
    return " | ".join(dict.fromkeys(named)) or "null"


def _alone(node: Any) -> list[str]:
    """What a bare word in the place of a node is called, where it may be one."""
    short = getattr(node, "_short", None)
    if short is None:
        return []
    named = names(hints(node)[short])
    return [f"a {short}" if named == "text" else named]
