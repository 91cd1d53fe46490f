"""Calls as a name and then a JSON object, between marks of a family's own: Mistral, DeepSeek, Kimi K2."""

from __future__ import annotations

import re

from llmkit.inference.said.jsontext import SPACE
from llmkit.inference.said.objects import listed
from llmkit.inference.said.source import Source, Wait
from llmkit.inference.said.told import NAME, Told, arguments, name

KIMI = re.compile(r"[A-Za-z0-9_.\-:]*")
SEPARATOR = "<｜tool▁sep｜>"


def mark(src: Source, told: Told) -> Wait[bool]:
    """A mark around calls, which says nothing by itself."""
    yield from ()
    return True


def mistral(src: Source, told: Told) -> Wait[bool]:
    """`[TOOL_CALLS][{...}, {...}]`, or since 2025 `[TOOL_CALLS]f{...}` and `[TOOL_CALLS]f[ARGS]{...}`."""
    yield from src.run(SPACE)
    if (yield from src.peek()) == "[":
        return (yield from listed(src, told))
    called = yield from name(src)
    if (yield from src.peek()) == "[":
        found = yield from src.word(("[CALL_ID]", "[ARGS]"))
        if found == "[CALL_ID]":
            yield from src.run(NAME)
            found = yield from src.word(("[ARGS]",))
        if not found:
            return False
    yield from src.run(SPACE)
    return (yield from argued(src, told, called))


def deepseek(src: Source, told: Told) -> Wait[bool]:
    """V3 and R1: `function<sep>f`, then the object in a fence; V3.1: `f<sep>{...}`; both up to the end mark."""
    called = yield from name(src)
    if not (yield from src.word((SEPARATOR,))):
        return False
    fenced = (yield from src.peek()) != "{"
    if fenced:
        if called != "function":
            return False
        called = yield from name(src)
        yield from src.run(SPACE)
        if not (yield from src.word(("```json",))):
            return False
        yield from src.run(SPACE)
    if not (yield from argued(src, told, called)):
        return False
    return (yield from closed(src, told, *(("```",) if fenced else ()), "<｜tool▁call▁end｜>"))


def kimi(src: Source, told: Told) -> Wait[bool]:
    """`functions.f:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`."""
    yield from src.run(SPACE)
    id = yield from src.run(KIMI, 200)
    called = re.sub(r":\d+$", "", id.removeprefix("functions."))
    yield from src.run(SPACE)
    if not (yield from src.word(("<|tool_call_argument_begin|>",))):
        return False
    yield from src.run(SPACE)
    if not (yield from argued(src, told, called)):
        return False
    return (yield from closed(src, told, "<|tool_call_end|>"))


def argued(src: Source, told: Told, called: str) -> Wait[bool]:
    """Reads the object of a call's arguments, and tells the call; false where it is none."""
    text = yield from arguments(src, told, called)
    return text is not None and told.call(called, text)


def closed(src: Source, told: Told, *marks: str) -> Wait[bool]:
    """Reads marks after a call that has been told; where one does not come, what came in its place is text."""
    src.forget()
    for each in marks:
        yield from src.run(SPACE)
        if not (yield from src.word((each,))):
            return False
        src.forget()
    return True
