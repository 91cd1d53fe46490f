"""Calls as JSON objects: `{"name": "f", "arguments": {...}}`, alone, in a list, or one after another."""

from __future__ import annotations

import json
import re

from llmkit.inference.said.jsontext import SPACE, is_value, pairs, sound, string
from llmkit.inference.said.source import Source, Wait
from llmkit.inference.said.told import Told, arguments

ARGUMENTS = ("arguments", "parameters")
BETWEEN = re.compile(r"[\s;]*")


class Member:
    """The members of one call, as they are read."""

    def __init__(self, src: Source, told: Told) -> None:
        self.src, self.told = src, told
        self.name, self.arguments = "", "{}"
        self.seen: set[str] = set()

    def read(self, key: str) -> Wait[bool]:
        """Reads the value of a key; false where a call has no such key, or has it already."""
        key = json.loads(key)
        kind = "arguments" if key in ARGUMENTS else key
        if kind in self.seen:
            return False
        self.seen.add(kind)
        if kind == "arguments":
            return (yield from self._arguments())
        if kind not in ("name", "type", "id"):
            return False
        text = yield from string(self.src)
        if text is not None and kind == "name":
            self.name = json.loads(text)
        return text is not None

    def _arguments(self) -> Wait[bool]:
        if (yield from self.src.peek()) == '"':  # an object as text, as requests write it
            text = yield from string(self.src)
            inner = json.loads(text) if text is not None else ""
            self.arguments = sound(inner)
            return inner.lstrip().startswith("{") and is_value(inner)
        text = yield from arguments(self.src, self.told, self.name)
        self.arguments = text or ""
        return text is not None


def call(src: Source, told: Told) -> Wait[bool]:
    """One object."""
    member = Member(src, told)
    good = yield from pairs(src, member.read)
    return good and told.call(member.name, member.arguments)


def several(src: Source, told: Told) -> Wait[bool]:
    """Objects with `;` or nothing between them: all that follow the first."""
    yield from src.run(SPACE)
    if not (yield from call(src, told)):
        return False
    while True:
        src.open()
        yield from src.run(BETWEEN)
        more = (yield from src.peek()) == "{"
        between = src.close()
        if not more:
            told.text(between if between.strip("; \n") else "")
            return True
        src.forget()
        if not (yield from call(src, told)):
            return False


def listed(src: Source, told: Told) -> Wait[bool]:
    """A list of objects."""
    yield from src.run(SPACE)
    if not (yield from src.word(("[",))):
        return False
    while True:
        yield from src.run(SPACE)
        if not (yield from call(src, told)):
            return False
        src.forget()
        yield from src.run(SPACE)
        if (after := (yield from src.word((",", "]")))) != ",":
            return after == "]"
