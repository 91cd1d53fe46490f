"""What has been found so far: events in order, calls by number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmkit.inference.said.events import CallArguments, CallBegins, CallEnds, Reasoning, Said, Text
from llmkit.inference.said.jsontext import value
from llmkit.inference.said.source import Source, Wait

NAME = re.compile(r"[A-Za-z0-9_.\-]*")
LONGEST_NAME = 128


class Told:
    """Collects events; `tools` are those that were offered, by name, with the JSON schemas of their arguments."""

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], eager: bool) -> None:
        self.tools, self.eager = tools, eager
        self.out: list[Said] = []
        self.calls = 0
        self.open = False
        """Whether a call has begun and not ended."""

    def text(self, text: str) -> None:
        """To the user."""
        if text:
            self.out.append(Text(text))

    def reasoning(self, text: str) -> None:
        """To itself."""
        if text:
            self.out.append(Reasoning(text))

    def begin(self, name: str) -> None:
        """A call's arguments follow."""
        self.out.append(CallBegins(self.calls, name))
        self.open = True

    def argued(self, text: str) -> None:
        """More of its arguments."""
        self.out.append(CallArguments(self.calls, text))

    def end(self, whole: bool = True) -> None:
        """It is complete, or will never be."""
        self.out.append(CallEnds(self.calls, whole))
        self.calls += 1
        self.open = False

    def call(self, name: str, arguments: str) -> bool:
        """A whole call, unless no such tool was offered."""
        if name not in self.tools:
            return False
        if not self.open:
            self.begin(name)
            self.argued(arguments)
        self.end()
        return True


def arguments(src: Source, told: Told, name: str) -> Wait[str | None]:
    """Reads the JSON object of a call's arguments; told as it comes where `told` is eager and the name is known."""
    if (yield from src.peek()) != "{":
        return None
    if told.eager and name in told.tools:
        told.begin(name)
        src.tap = told.argued
    src.open()
    good = yield from value(src)
    text, src.tap = src.close(), None
    return text if good else None


def name(src: Source) -> Wait[str]:
    """Reads the name of a tool."""
    return (yield from src.run(NAME, LONGEST_NAME))
