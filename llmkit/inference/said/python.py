"""Calls as a list of Python calls, `[f(a=1, b="x"), g()]`: read as text, never run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from llmkit.inference.said.jsontext import DEEPEST, LONGEST, NUMBER, sound
from llmkit.inference.said.source import SPACE, Source, Wait
from llmkit.inference.said.told import NAME, Told

CODES = {"x": 2, "u": 4, "U": 8}
SHORT = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
DIGITS = re.compile(r"[-+0-9.eE_]*")
LETTERS = re.compile(r"[A-Za-z]*")
PLAIN = {quote: re.compile(rf"[^{quote}\\\n]*") for quote in "'\""}


def calls(src: Source, told: Told) -> Wait[bool]:
    """The whole list, which is told when it has ended: prose that begins like one stays prose."""
    yield from src.run(SPACE)
    if not (yield from src.word(("[",))):
        return False
    found: list[tuple[str, str]] = []

    def one() -> Wait[str | None]:
        name = yield from src.run(NAME, 200)
        text = (yield from _arguments(src)) if name in told.tools else None
        found.append((name, text or ""))
        return text

    if (yield from _several(src, "]", one)) is None or not found:
        return False
    for name, text in found:
        told.call(name, text)
    return True


def _arguments(src: Source) -> Wait[str | None]:
    """`(a=1, b=2)` as a JSON object."""
    if not (yield from src.word(("(",))):
        return None
    found: dict[str, str] = {}

    def one() -> Wait[str | None]:
        key = yield from src.run(NAME, 200)
        yield from src.run(SPACE)
        if not key or key in found or not (yield from src.word(("=",))):
            return None
        yield from src.run(SPACE)
        text = yield from _value(src, 0)
        found[key] = text or ""
        return text

    if (yield from _several(src, ")", one)) is None:
        return None
    return "{" + ", ".join(f"{json.dumps(key)}: {text}" for key, text in found.items()) + "}"


def _several(src: Source, end: str, one: Callable[[], Wait[str | None]]) -> Wait[list[str] | None]:
    """What `one` reads, with commas between, up to `end`; a last comma is let pass."""
    found: list[str] = []
    while True:
        yield from src.run(SPACE)
        if (yield from src.peek()) == end:
            src.read()
            return found
        text = yield from one()
        if text is None:
            return None
        found.append(text)
        yield from src.run(SPACE)
        if (after := (yield from src.word((",", end)))) != ",":
            return found if after else None


def _value(src: Source, depth: int) -> Wait[str | None]:
    c = yield from src.peek()
    if not c or depth > DEEPEST:
        return None
    if c in "'\"":
        return (yield from _string(src))
    if c in "[(":
        src.read()
        parts = yield from _several(src, {"[": "]", "(": ")"}[c], lambda: _value(src, depth + 1))
        return None if parts is None else "[" + ", ".join(parts) + "]"
    if c == "{":
        src.read()
        parts = yield from _several(src, "}", lambda: _pair(src, depth + 1))
        return None if parts is None else "{" + ", ".join(parts) + "}"
    if c in "-+.0123456789":
        return number((yield from src.run(DIGITS, LONGEST + 1)))
    return WORDS.get((yield from src.run(LETTERS, 8)))


def _pair(src: Source, depth: int) -> Wait[str | None]:
    key = yield from _string(src)
    yield from src.run(SPACE)
    if key is None or not (yield from src.word((":",))):
        return None
    yield from src.run(SPACE)
    text = yield from _value(src, depth)
    return None if text is None else f"{key}: {text}"


def number(text: str) -> str | None:
    """The JSON of a Python number, if it has one."""
    bare = text.removeprefix("+").replace("_", "")
    bare = re.sub(r"^(-?)\.", r"\g<1>0.", bare)
    bare = re.sub(r"\.(?=[eE]|$)", ".0", bare)
    return bare if len(text) <= LONGEST and NUMBER.fullmatch(bare) else None


def _string(src: Source) -> Wait[str | None]:
    """A string in either quotes, as JSON."""
    quote = yield from src.word(("'", '"'))
    if not quote:
        return None
    parts: list[str] = []
    while True:
        parts.append((yield from src.run(PLAIN[quote])))
        c = yield from src.peek()
        if not c or c == "\n":
            return None
        src.read()
        if c == quote:
            return sound(json.dumps("".join(parts), ensure_ascii=False))
        escaped = yield from _escaped(src)
        if escaped is None:
            return None
        parts.append(escaped)


def _escaped(src: Source) -> Wait[str | None]:
    """What stands behind a backslash; Python leaves what it does not know as it is."""
    c = yield from src.peek()
    if not c:
        return None
    src.read()
    if c not in CODES:
        return SHORT.get(c, c if c in "\\'\"" else "\\" + c)
    digits = ""
    while len(digits) < CODES[c] and (d := (yield from src.peek())) and d in "0123456789abcdefABCDEF":
        digits += src.read()
    point = int(digits, 16) if len(digits) == CODES[c] else -1
    return chr(point) if 0 <= point < 0x110000 else None
