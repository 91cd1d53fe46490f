"""One machine for streamed and whole answers: pieces of text in, what is said in them out.

Where what begins like a call turns out to be none, what was held back of it is text, and reading goes on behind it.
Nothing is read twice, so an answer takes a time in proportion to its length, whatever it holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmkit.inference.said.events import Message, Said, message
from llmkit.inference.said.formats import Format
from llmkit.inference.said.source import SPACE, Source, Wait
from llmkit.inference.said.told import Told


class Parser:
    """Takes an answer apart as it comes."""

    def __init__(
        self,
        format: Format,
        tools: Mapping[str, Mapping[str, Any]] | None = None,
        begun: bool = False,
        eager: bool = False,
    ) -> None:
        """`tools`: the JSON schemas of the arguments by name; without any, calls are text. `begun`: the prompt has
        begun the reasoning (`Format.begun`). `eager`: arguments are told as they come, once a tool that was offered is
        named; what breaks off after that cannot be taken back, and ends as a call that is not whole. Else a call is
        told once all of it is there, and what is none is text."""
        self.format, self.begun = format, begun
        self.src, self.told = Source(), Told(tools or {}, eager)
        self.marks = {**format.calls.frames, **(format.calls.marks if tools else {})}
        self.bare = dict(format.calls.bare) if tools else {}
        self.words = (*self.marks, *((format.thinking.begin,) if format.thinking is not None else ()))
        self.firsts = {word[0] for word in self.words}
        held = re.escape("".join(sorted({*self.firsts, *self.bare})))
        self.others = re.compile(rf"[^\s{held}]+|.")
        self.spoken = False
        """Whether there was text or a call: a thought, and a call without a mark, stand before any."""
        self.run = self._listen()
        next(self.run)

    def feed(self, piece: str) -> list[Said]:
        """What is certain with this piece."""
        if piece:
            self.src.add(piece)
            next(self.run)
        return self._out()

    def finish(self) -> list[Said]:
        """What was held back, at the end of the answer; the parser takes no more."""
        self.src.over = True
        for _ in self.run:
            raise RuntimeError("an answer that has ended was waited for")
        return self._out()

    def _out(self) -> list[Said]:
        out, self.told.out = self.told.out, []
        return out

    def _listen(self) -> Wait[None]:
        src, told, thinking = self.src, self.told, self.format.thinking
        space: list[str] = []
        if quiet := (self.begun and thinking is not None):
            yield from thinking.read(src, told)
        while c := (yield from src.peek()):
            if c.isspace():
                space.append(src.here(SPACE))
                continue
            text = yield from self._next(c)
            if text:
                told.text(text if quiet else "".join(space) + text)
                self.spoken = True
            quiet = not text
            space.clear()
        told.text("" if quiet else "".join(space))

    def _next(self, c: str) -> Wait[str]:
        """Reads what begins with `c`, and gives it if it is text; the space around anything else says nothing."""
        src = self.src
        if c not in self.firsts and (self.spoken or c not in self.bare):
            return src.here(self.others)
        src.open()
        calls = self.told.calls
        good = yield from self._marked(c)
        text = src.close()
        if self.told.calls > calls:
            self.spoken = True
            text = text.lstrip()
        if self.told.open:  # it cannot be taken back
            self.told.end(whole=False)
            good = True
        return "" if good else text

    def _marked(self, c: str) -> Wait[bool]:
        """Reads a call or a thought, if it is one."""
        src, told, thinking = self.src, self.told, self.format.thinking
        if c in self.bare and not self.spoken:
            return (yield from self.bare[c](src, told))
        mark = yield from src.word(self.words)
        if mark in self.marks:
            return (yield from self.marks[mark](src, told))
        if thinking is None or mark != thinking.begin or self.spoken:
            return False
        yield from thinking.read(src, told)
        return True


def whole(
    text: str, format: Format, tools: Mapping[str, Mapping[str, Any]] | None = None, begun: bool = False
) -> Message:
    """A whole answer, by the same machine."""
    parser = Parser(format, tools, begun)
    return message([*parser.feed(text), *parser.finish()])
