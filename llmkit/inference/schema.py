"""What of JSON Schema can be enforced while a text is made; any other keyword is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from llmkit.inference.request import RequestError

LARGEST = 1 << 20
"""Letters of a schema or a grammar."""
DEEPEST = 50
"""Levels of schemas within schemas."""
LONGEST = 80
"""Letters of a name that are told."""
ONE = ("additionalProperties", "additionalItems", "items")
"""Keywords that hold a schema; `items` of old drafts a list of them."""
SEVERAL = ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
PLAIN = (
    *("type", "enum", "const", "$ref", "required"),
    *("minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "minProperties", "maxProperties"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
)
NOTES = (
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"),
    *("$comment", "$schema", "$id", "id", "$anchor"),
)
"""Keywords that constrain nothing."""


def enforced(text: str, key: str) -> Any:
    """The schema that `text` is, without keywords that say nothing.

    Raises:
        RequestError: it is none, or one of its keywords cannot be enforced.
    """
    if len(text) > LARGEST:
        raise RequestError(f"{len(text)} letters are more than {LARGEST}", fix="give a smaller schema", key=key)
    try:
        schema = json.loads(text, parse_constant=_number)
    except RecursionError as cause:
        raise RequestError("is nested too deeply", fix="give a flatter schema", key=key) from cause
    except ValueError as cause:
        raise RequestError(f"is no JSON: {cause}", fix="give a JSON schema", key=key) from cause
    _check(schema, key)
    return schema


def embedded(grammar: str, key: str) -> None:
    """
    Raises:
        RequestError: a grammar is too large, or a schema in it (`%json {...}`) has a keyword that cannot be enforced.
    """
    if len(grammar) > LARGEST:
        raise RequestError(f"{len(grammar)} letters are more than {LARGEST}", fix="give a smaller one", key=key)
    for found in re.finditer(r"%json\s*", grammar):
        try:
            schema, _ = json.JSONDecoder().raw_decode(grammar, found.end())
        except RecursionError as cause:
            raise RequestError("is nested too deeply", fix="give a flatter schema", key=key) from cause
        except ValueError:  # in a literal or a comment; if it is a schema after all, the grammar does not compile
            continue
        _check(schema, key)


def _number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


Way = tuple[Any, str]
"""Where a schema stands: the way to the one around it, and its own name. Put together where it is told alone: names may
be long, and the schemas within one many."""


def _told(way: Way) -> str:
    names: list[str] = []
    around: Any = way
    while around is not None:
        around, name = around
        names.append(name[:LONGEST])
    return ".".join(reversed(names))


def _check(schema: Any, key: str) -> None:
    left: list[tuple[Any, Way, int]] = [(schema, (None, key), 0)]
    while left:
        one, way, depth = left.pop()
        if depth > DEEPEST:
            what = f"has more than {DEEPEST} schemas within each other"
            raise RequestError(what, fix="give a flatter schema, or $ref", key=key)
        if not isinstance(one, dict | bool):
            raise RequestError(f"{type(one).__name__} is no schema", fix="give an object", key=_told(way))
        if isinstance(one, dict):
            for name in [name for name, value in one.items() if _idle(name, value)]:
                del one[name]
            for name, value in one.items():
                left += [(inner, at, depth + 1) for inner, at in _inner(name, value, (way, name))]


def _idle(name: str, value: Any) -> bool:
    """Whether a keyword says nothing."""
    return (name.startswith("x-") and name != "x-guidance") or (name == "uniqueItems" and value is False)


def _inner(name: str, value: Any, way: Way) -> Iterator[tuple[Any, Way]]:
    """The schemas under a keyword."""
    if name in NOTES or name in PLAIN:
        return
    if name in ONE and not (name == "items" and isinstance(value, list)):
        yield value, way
    elif name in SEVERAL or name == "items":
        if not isinstance(value, list):
            raise RequestError(f"{type(value).__name__} is no list of schemas", fix="give a list", key=_told(way))
        yield from ((inner, (way, str(at))) for at, inner in enumerate(value))
    elif name in NAMED:
        if not isinstance(value, dict):
            raise RequestError(f"{type(value).__name__} is no mapping of schemas", fix="give an object", key=_told(way))
        yield from ((inner, (way, at)) for at, inner in value.items())
    else:
        what = f"the keyword {name[:LONGEST]} cannot be enforced"
        raise RequestError(what, fix="leave it out", key=_told(way))
