"""JSON of a stranger: read whole or refused, never repaired."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from llmkit.serve.refusal import Refusal

DEEPEST = 64
"""Levels of objects and lists."""


def read_json(body: bytes) -> dict[str, Any]:
    """The object of a body.

    Raises:
        Refusal: 400, what is wrong with it.
    """
    try:
        text = body.decode("utf-8")
        held = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise Refusal(400, f"the body nests more than {DEEPEST} deep", code="invalid_json") from None
    except ValueError as cause:
        raise Refusal(400, f"the body is no JSON: {cause}", code="invalid_json") from cause
    if not isinstance(held, dict):
        raise Refusal(400, f"the body is a JSON {type(held).__name__}, not an object", code="invalid_json")
    for text in _texts(held):
        _check(text)
    return held


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:  # in one pass: there may be hundreds of thousands
            if name in seen:
                raise ValueError(f"the key {name[:80]!r} is there twice")
            seen.add(name)
    return made


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _texts(held: Any) -> Iterator[str]:
    """Every text in it, names too, without recursion."""
    layer, depth = [held], 0
    while layer:
        depth += 1
        if depth > DEEPEST:
            raise Refusal(400, f"the body nests more than {DEEPEST} deep", code="invalid_json")
        deeper: list[Any] = []
        for item in layer:
            if isinstance(item, str):
                yield item
            elif isinstance(item, dict):
                yield from item
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
        layer = deeper


def _check(text: str) -> None:
    if "\0" in text:
        raise Refusal(400, "the body holds a NUL character", code="invalid_json")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refusal(400, "the body holds half a surrogate pair, which no UTF-8 has", code="invalid_json") from None
