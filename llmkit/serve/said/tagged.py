"""Calls as tags around each argument, whose values are bare text: Qwen3-Coder, MiniMax, GLM-4.5.

What a value is, the tool's schema says: a text stays a text, anything else is JSON where it reads as such.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.serve.said.jsontext import SPACE, is_value
from llmkit.serve.said.named import closed
from llmkit.serve.said.objects import call
from llmkit.serve.said.source import Source, Wait
from llmkit.serve.said.told import Told, name

LONGEST_KEY = 256


@dataclass(frozen=True)
class Tags:
    """The tags of a family, in the order in which they come."""

    function: str
    """Before the tool's name."""
    named: str
    """After it."""
    key: str
    keyed: str
    value: str
    valued: str
    ends: tuple[str, ...]
    """After the last argument: what completes the call, and what may follow."""

    def read(self, src: Source, told: Told) -> Wait[bool]:
        """Reads a call; one as a JSON object is taken too, since some models mix the two."""
        yield from src.run(SPACE)
        if (yield from src.peek()) == "{":
            return (yield from call(src, told)) and (yield from closed(src, told, self.ends[-1]))
        if self.function and not (yield from src.word((self.function,))):
            return False
        return (yield from self.body(src, told))

    def body(self, src: Source, told: Told) -> Wait[bool]:
        """The same after the mark of the function."""
        called = yield from name(src)
        if called not in told.tools or (self.named and not (yield from src.word((self.named,)))):
            return False
        found = yield from self._arguments(src, told.tools[called])
        if found is None:
            return False
        told.call(called, "{" + ", ".join(f"{json.dumps(key)}: {text}" for key, text in found.items()) + "}")
        return (yield from closed(src, told, *self.ends[1:]))

    def _arguments(self, src: Source, schema: Mapping[str, Any]) -> Wait[dict[str, str] | None]:
        found: dict[str, str] = {}
        while True:
            yield from src.run(SPACE)
            mark = yield from src.word((self.key, self.ends[0]))
            if mark == self.ends[0]:
                return found
            key = (yield from src.until(self.keyed, LONGEST_KEY)) if mark else None
            if key is None or key in found:
                return None
            if self.value:
                yield from src.run(SPACE)
                if not (yield from src.word((self.value,))):
                    return None
            text = yield from src.until(self.valued)
            if text is None:
                return None
            found[key] = written(text, kinds(schema, key))


def written(text: str, kinds: frozenset[str]) -> str:
    """JSON for a bare text: without the line breaks around it, and a text unless another kind is asked for."""
    text = text.removeprefix("\n").removesuffix("\n")
    if "string" in kinds and not (text == "null" and "null" in kinds):
        return json.dumps(text, ensure_ascii=False)
    bare = text.strip()
    if bare in ("True", "False", "None") and kinds & {"boolean", "null"}:
        bare = {"True": "true", "False": "false", "None": "null"}[bare]
    return bare if is_value(bare) else json.dumps(text, ensure_ascii=False)


def kinds(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """The types that a schema allows for a property; none where it does not say."""
    properties = schema.get("properties")
    return _kinds(properties.get(key)) if isinstance(properties, Mapping) else frozenset()


def _kinds(schema: Any) -> frozenset[str]:
    if not isinstance(schema, Mapping):
        return frozenset()
    said = schema.get("type", [])
    found = frozenset([said] if isinstance(said, str) else [one for one in said if isinstance(one, str)])
    values = schema.get("enum")
    if isinstance(values, list) and any(isinstance(one, str) for one in values):
        found |= {"string"}
    members = [one for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list) for one in schema[key]]
    return found.union(*({one["type"]} for one in members if isinstance(one, Mapping) and _named(one)))


def _named(schema: Mapping[str, Any]) -> bool:
    return isinstance(schema.get("type"), str)
