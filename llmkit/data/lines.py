"""The lines of a file as bytes, each with its place and a bound on its length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from llmkit.data.rows import KEPT, At, BadRow

MOST_LINE = 1 << 24
TOO_LONG = f"is longer than {MOST_LINE >> 20} MiB"
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """One line and where it stands: the place of its first byte in the file, and that of the next line's."""

    text: bytes
    """With its end, and without the mark of UTF-8 that a file may begin with."""
    file: str
    number: int
    at: int
    end: int
    long: bool = False
    """Whether it is too long, so that only its beginning is here."""

    @property
    def behind(self) -> At:
        """Where reading goes on behind it."""
        return self.end, self.number

    def bad(self, what: str, fix: str) -> BadRow:
        """The error that the line is."""
        return BadRow(what, fix, self.file, self.number, self.text, self.behind)


def lines(file: BinaryIO, name: str, at: int = 0, number: int = 0) -> Iterator[Line]:
    """The lines from the byte `at` on, before which there are `number` of them."""
    file.seek(at)
    while text := file.readline(MOST_LINE + 1):
        number += 1
        end = at + len(text)
        if len(text) > MOST_LINE:
            end += _skip(file)
            yield Line(text[:KEPT], name, number, at, end, long=True)
        else:
            body = text.removeprefix(BOM) if number == 1 else text
            yield Line(body, name, number, end - len(body), end)
        at = end


def _skip(file: BinaryIO) -> int:
    """Goes on to the next line without holding what it skips; gives its bytes."""
    skipped = 0
    while text := file.readline(1 << 20):
        skipped += len(text)
        if text.endswith(b"\n"):
            break
    return skipped
