"""Rows of plain text: a line, a paragraph or a whole file each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from llmkit.core.errors import DataError
from llmkit.data.lines import TOO_LONG, Line, lines
from llmkit.data.rows import At, BadRow, Raw
from llmkit.data.sources import opened

PIECE = 1 << 20
"""Bytes of a document that are one row, and the rest of its line: a longer document is several, each but the last of
which says that there is more."""


def decoded(line: Line, encoding: str) -> str | BadRow:
    """A line as text, or the error that it is."""
    if (place := line.text.find(b"\0")) >= 0:
        return line.bad(f"byte {line.at + place} is NUL, which no text has", "save the file as UTF-8 text")
    try:
        return line.text.decode(encoding)
    except UnicodeDecodeError as cause:
        what = f"byte {line.at + cause.start} is not {encoding.upper()}"
        return line.bad(what, "save the file as UTF-8, or set encoding")


def read_text(
    path: str, after: At = (), *, document: Literal["line", "paragraph", "file"] = "line", encoding: str = "utf-8"
) -> Iterator[Raw | BadRow]:
    """The documents of a file, without the line end behind them; blank lines are none.

    Raises:
        DataError: the file cannot be read at all, or is no text.
    """
    with opened(path, "text") as file:
        if (place := file.read(1 << 13).find(b"\0")) >= 0:
            raise DataError(f"is binary: byte {place} is NUL", fix="give a text file in UTF-8", file=path)
        held = _Held(rest=bool(after and after[2]))
        for line in lines(file, path, *after[:2]):
            blank = not line.text.strip()
            if held.lines and (document == "line" or (document == "paragraph" and blank)):
                yield held.row()
            if blank and not (document == "file" and held.lines):
                held.rest = held.rest and document == "file"
                continue
            text = line.bad(TOO_LONG, "break the line") if line.long else decoded(line, encoding)
            if isinstance(text, BadRow):
                if held.lines:  # a document ends where it cannot be read
                    yield held.row()
                held.rest, text.at = False, (*line.behind, 0)
                yield text
                continue
            if held.size >= PIECE and not blank:  # blank lines at the end are no piece
                yield held.row(more=True)
            held.add(line, text)
        if held.lines:
            yield held.row()


class _Held:
    """The lines of the document that is being read."""

    def __init__(self, rest: bool = False) -> None:
        self.rest = rest
        self.lines: list[Line] = []
        self.texts: list[str] = []
        self.size = 0

    def add(self, line: Line, text: str) -> None:
        """One line more."""
        self.lines.append(line)
        self.texts.append(text)
        self.size += len(line.text)

    def row(self, more: bool = False) -> Raw:
        """The lines as a row, after which none is held."""
        whole = "".join(self.texts)
        first, last, rest = self.lines[0], self.lines[-1], self.rest
        self.rest, self.lines, self.texts, self.size = more, [], [], 0
        values = {"text": whole if more else whole.rstrip("\r\n")}
        return Raw(values, first.file, first.number, at=(*last.behind, int(more)), more=more, rest=rest)
