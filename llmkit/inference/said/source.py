"""Text that comes in pieces, read as if it were all there.

What reads it is a generator that yields where it needs the next piece. It sees one character after another and never
goes back, so how the text was cut cannot matter, and no input takes more than a time in proportion to its length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Wait = Generator[None, None, T]
"""Gives a T once enough of the text has come."""

SPACE = re.compile(r"\s*")
NEVER = 2**60
"""As a bound: there is none."""


class Source:
    """The text that is not read yet, and records of some that was."""

    def __init__(self) -> None:
        self.piece, self.at, self.over = "", 0, False
        self.records: list[list[str]] = []
        self.tap: Callable[[str], None] | None = None
        """Is given what is read, as it is read."""

    def add(self, piece: str) -> None:
        """The next piece; the one before has been read to its end."""
        self.piece, self.at = piece, 0

    def peek(self) -> Wait[str]:
        """The next character, which stays; nothing at the end of the text."""
        while self.at >= len(self.piece):
            if self.over:
                return ""
            yield
        return self.piece[self.at]

    def read(self, count: int = 1) -> str:
        """The next characters of this piece."""
        taken = self.piece[self.at : self.at + count]
        self.at += len(taken)
        for record in self.records:
            record.append(taken)
        if self.tap is not None:
            self.tap(taken)
        return taken

    def here(self, pattern: re.Pattern[str], most: int = NEVER) -> str:
        """What `pattern`, a run of a class of characters, matches in this piece, up to `most` characters."""
        found = pattern.match(self.piece, self.at, self.at + most)
        return self.read(found.end() - self.at) if found and found.end() > self.at else ""

    def run(self, pattern: re.Pattern[str], most: int = NEVER) -> Wait[str]:
        """What `pattern` matches, across pieces, up to `most` characters."""
        parts: list[str] = []
        while most > 0 and (yield from self.peek()):
            part = self.here(pattern, most)
            parts.append(part)
            most -= len(part)
            if not part or self.at < len(self.piece):
                break
        return "".join(parts)

    def word(self, words: Sequence[str]) -> Wait[str]:
        """The one of `words`, none of which begins another, that comes next; else nothing, and what began like one is
        read. The first character of a word is nowhere else in it, so that none can begin inside of what is read."""
        got = ""
        while c := (yield from self.peek()):
            if not any(word.startswith(got + c) for word in words):
                return ""
            got += self.read()
            if got in words:
                return got
        return ""

    def until(self, word: str, most: int = NEVER) -> Wait[str | None]:
        """The text before `word`, which is read too; none where that does not come within `most` characters."""
        others, parts = re.compile(f"[^{re.escape(word[0])}]*"), list[str]()
        while most > 0 and (yield from self.peek()):
            self.open()
            yield from self.run(others, most)
            found = yield from self.word((word,))
            got = self.close()
            parts.append(got)
            most -= len(got)
            if found:
                return "".join(parts)[: -len(word)]
        return None

    def open(self) -> None:
        """Records what is read from here on."""
        self.records.append([])

    def close(self) -> str:
        """Ends the latest record, and gives it."""
        return "".join(self.records.pop())

    def forget(self, left: str = "") -> None:
        """The outermost record begins again here, or with what is `left` of it."""
        self.records[0][:] = [left]
