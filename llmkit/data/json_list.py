"""One list of JSON objects a file, as Alpaca's and ShareGPT's data are often kept: read object by object."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llmkit.core.errors import DataError
from llmkit.data.lines import BOM
from llmkit.data.rows import KEPT, At, BadRow, Raw
from llmkit.data.sources import opened

PIECE = 1 << 18
MOST = 1 << 24
"""Letters of one object."""
SPACE = " \t\r\n"
SCAN = json.JSONDecoder()


class _Text:
    """The file's text from a byte on, as much of it as is needed at a time."""

    def __init__(self, file: BinaryIO, name: str, byte: int, line: int) -> None:
        file.seek(byte)
        self.file, self.name, self.byte, self.line = file, name, byte, line
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        self.held, self.whole = "", False

    def more(self) -> bool:
        """Reads on; whether there was anything.

        Raises:
            DataError: it is not UTF-8.
        """
        piece = self.file.read(max(PIECE, len(self.held)))
        try:
            self.held += self.decoder.decode(piece, not piece)
        except UnicodeDecodeError as cause:
            raise self.fault("is not UTF-8", "save the file as UTF-8") from cause
        self.whole = not piece
        return bool(piece)

    def next(self) -> str:
        """The next letter that is no space; nothing at the end."""
        while True:
            self.take(len(self.held) - len(self.held.lstrip(SPACE)))
            if self.held or not self.more():
                return self.held[:1]

    def take(self, size: int) -> str:
        """The next letters, which are done with."""
        taken, self.held = self.held[:size], self.held[size:]
        self.byte += len(taken.encode("utf-8", "surrogatepass"))
        self.line += taken.count("\n")
        return taken

    def fault(self, what: str, fix: str) -> DataError:
        """An error behind which nothing can be read."""
        return DataError(f"{what} at byte {self.byte}", fix=fix, file=self.name, line=self.line)


def read_json(path: str | Path, after: At = ()) -> Iterator[Raw | BadRow]:
    """The objects of a list, or the error that one is.

    Raises:
        DataError: the file is no list, or is broken in a way that hides where its next object begins.
    """
    with opened(path, "json") as file:
        start = file.read(len(BOM))
        byte, line = after or (len(BOM) if start == BOM else 0, 1)
        text = _Text(file, str(path), byte, line)
        first = not after
        if first:
            _begin(text)
        while True:
            letter = text.next()
            if letter == "]":
                text.take(1)
                if text.next():
                    raise text.fault("goes on behind its list", "keep one list in a file")
                return
            if not first:
                _comma(text, letter)
            yield _object(text)
            first = False


def _begin(text: _Text) -> None:
    letter = text.next()
    if letter == "{":
        raise text.fault("holds objects and no list of them", "use kind: jsonl")
    if letter != "[":
        raise text.fault("is no list of objects", "write [ {...}, {...} ]")
    text.take(1)


def _comma(text: _Text, letter: str) -> None:
    if letter != ",":
        what = "is torn off" if not letter else "is not JSON (no comma between two objects)"
        raise text.fault(what, "mend the file")
    text.take(1)
    text.next()


def _object(text: _Text) -> Raw | BadRow:
    """The object that begins here."""
    while True:
        try:
            said, size = SCAN.raw_decode(text.held)
        except RecursionError as cause:
            raise text.fault("nests too deep", "flatten the row") from cause
        except json.JSONDecodeError as cause:
            if len(text.held) > MOST:
                raise text.fault(f"holds an object of more than {MOST >> 20} MiB", "split the row") from cause
            if text.more():
                continue
            torn = cause.pos >= len(text.held) or cause.msg.startswith("Unterminated")
            raise text.fault("is torn off" if torn else f"is not JSON ({cause.msg})", "mend the file") from cause
        except ValueError as cause:  # a number of more digits than Python reads
            raise text.fault(f"cannot be read ({str(cause).split(';')[0]})", "mend the row") from cause
        if size == len(text.held) and not isinstance(said, dict | list | str) and text.more():
            continue  # a number may go on
        line = text.line
        kept = text.take(size).encode("utf-8", "surrogatepass")[:KEPT]
        if isinstance(said, dict):
            return Raw(said, text.name, line, kept, (text.byte, text.line))
        return BadRow("holds what is no object", "write objects alone", text.name, line, kept, (text.byte, text.line))
