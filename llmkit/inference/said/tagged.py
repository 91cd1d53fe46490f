"""Calls as tags around each argument, whose values are bare text: Qwen3-Coder, MiniMax, GLM-4.5.

What a value is, the tool's schema says: a text stays a text, anything else is JSON where it reads as such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.inference.said.jsontext import SPACE, is_value
from llmkit.inference.said.named import closed
from llmkit.inference.said.objects import call
from llmkit.inference.said.source import Source, Wait
from llmkit.inference.said.told import Told, name

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
        made = Object(told, called)
        if not (yield from self._arguments(src, made, told.tools[called])):
            return False
        made.end()
        return (yield from closed(src, told, *self.ends[1:]))

    def _arguments(self, src: Source, made: Object, schema: Mapping[str, Any]) -> Wait[bool]:
        while True:
            yield from src.run(SPACE)
            mark = yield from src.word((self.key, self.ends[0]))
            if mark == self.ends[0]:
                return True
            key = (yield from src.until(self.keyed, LONGEST_KEY)) if mark else None
            if key is None or key in made.keys:
                return False
            if self.value:
                yield from src.run(SPACE)
                if not (yield from src.word((self.value,))):
                    return False
            if not (yield from self._value(src, made, key, kinds(schema, key))):
                return False

    def _value(self, src: Source, made: Object, key: str, kinds: frozenset[str]) -> Wait[bool]:
        """A text is told as it comes; what else a value is, is known when all of it is there."""
        if kinds == {"string"}:
            made.key(key)
            made.add('"')
            good = yield from lines(src, self.valued, lambda text: made.add(quoted(text)))
            made.add('"' if good else "")
            return good
        text = yield from src.until(self.valued)
        if text is None:
            return False
        made.key(key)
        made.add(written(text, kinds))
        return True


class Object:
    """The object of a call's arguments, told as it comes or when it is whole."""

    def __init__(self, told: Told, name: str) -> None:
        self.told, self.name = told, name
        self.keys: set[str] = set()
        self.parts: list[str] = []

    def key(self, key: str) -> None:
        """A member begins."""
        self.add(("{" if not self.keys else ", ") + json.dumps(key) + ": ")
        self.keys.add(key)

    def add(self, text: str) -> None:
        """More of it, as JSON text."""
        if not self.told.eager:
            self.parts.append(text)
            return
        if not self.told.open:
            self.told.begin(self.name)
        if text:
            self.told.argued(text)

    def end(self) -> None:
        """It is whole."""
        self.add("}" if self.keys else "{}")
        self.told.call(self.name, "".join(self.parts))


def lines(src: Source, mark: str, tell: Callable[[str], None]) -> Wait[bool]:
    """Tells text up to `mark`, without the line breaks around it; false where the mark never comes."""
    others, first, held = re.compile(rf"[^\n{re.escape(mark[0])}]+"), True, ""
    while c := (yield from src.peek()):
        src.open()
        found = (yield from src.word((mark,))) if c == mark[0] else ""
        if c != mark[0]:
            _ = src.read() if c == "\n" else src.here(others)
        got = src.close()
        if found:
            return True
        if got != "\n":
            tell(held + got)
            held = ""
        elif not first:
            tell(held)
            held = got  # the last one is left out
        first = False
    return False


def quoted(text: str) -> str:
    """A part of a text as it stands within JSON's quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


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
