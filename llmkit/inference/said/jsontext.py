"""JSON read strictly, character by character, as text: nothing is made of it, so nothing can be too large or too deep.

The grammar of RFC 8259, with bounds: `DEEPEST` levels, numbers of `LONGEST` characters (Python's own reader refuses
integers of some thousands).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from llmkit.inference.said.source import Source, Wait

SPACE = re.compile(r"[ \t\n\r]*")
PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
DIGITS = re.compile(r"[-+0-9.eE]*")
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
HEX = "0123456789abcdefABCDEF"
HALF = re.compile(r"[\ud800-\udfff]")
DEEPEST = 64
LONGEST = 1000


def value(src: Source, depth: int = 0) -> Wait[bool]:
    """Reads one value; false where it is none."""
    c = yield from src.peek()
    if c == '"':
        return (yield from string(src)) is not None
    if c in ("{", "["):
        if depth >= DEEPEST:
            return False
        inner = _anything(src, depth + 1)
        return (yield from (pairs(src, inner) if c == "{" else _items(src, inner)))
    if c and c in "-0123456789":
        number = yield from src.run(DIGITS, LONGEST + 1)
        return len(number) <= LONGEST and NUMBER.fullmatch(number) is not None
    return bool((yield from src.word(("true", "false", "null"))))


def pairs(src: Source, read: Callable[[str], Wait[bool]]) -> Wait[bool]:
    """Reads an object; `read` reads the value of a key, which it is given as JSON text."""
    if not (yield from src.word(("{",))):
        return False
    yield from src.run(SPACE)
    if (yield from src.peek()) == "}":
        return bool(src.read())
    while True:
        key = yield from string(src)
        if key is None:
            return False
        yield from src.run(SPACE)
        if not (yield from src.word((":",))):
            return False
        yield from src.run(SPACE)
        if not (yield from read(key)):
            return False
        yield from src.run(SPACE)
        if (after := (yield from src.word((",", "}")))) != ",":
            return after == "}"
        yield from src.run(SPACE)


def string(src: Source) -> Wait[str | None]:
    """Reads a string, and gives it as JSON text."""
    src.open()
    ok = yield from _string(src)
    text = src.close()
    return text if ok else None


def is_value(text: str) -> bool:
    """Whether a text is one JSON value and nothing more."""
    src = Source()
    src.add(text)
    src.over = True

    def all_of_it() -> Wait[bool]:
        yield from src.run(SPACE)
        good = yield from value(src)
        yield from src.run(SPACE)
        return good and src.at == len(text)

    try:
        next(all_of_it())
    except StopIteration as end:
        return bool(end.value)
    raise RuntimeError("a text that is all there was waited for")


def sound(text: str) -> str:
    """JSON text in which a half of a surrogate pair is an escape: no UTF-8 has it as a letter."""
    return HALF.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _string(src: Source) -> Wait[bool]:
    if not (yield from src.word(('"',))):
        return False
    while True:
        yield from src.run(PLAIN)
        c = yield from src.peek()
        if c not in ('"', "\\") or not c:
            return False
        src.read()
        if c == '"':
            return True
        if not (yield from _escaped(src)):
            return False


def _escaped(src: Source) -> Wait[bool]:
    c = yield from src.peek()
    if not c or c not in '"\\/bfnrtu':
        return False
    src.read()
    for _ in range(4 if c == "u" else 0):
        c = yield from src.peek()
        if not c or c not in HEX:
            return False
        src.read()
    return True


def _items(src: Source, read: Callable[[str], Wait[bool]]) -> Wait[bool]:
    src.read()
    yield from src.run(SPACE)
    if (yield from src.peek()) == "]":
        return bool(src.read())
    while True:
        if not (yield from read("")):
            return False
        yield from src.run(SPACE)
        if (after := (yield from src.word((",", "]")))) != ",":
            return after == "]"
        yield from src.run(SPACE)


def _anything(src: Source, depth: int) -> Callable[[str], Wait[bool]]:
    return lambda _: value(src, depth)
