"""Rows of tables as text: fields between commas or tabs, quoted as RFC 4180 has it."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from llmkit.core.errors import DataError
from llmkit.data.lines import MOST_LINE, TOO_LONG, Line, lines
from llmkit.data.rows import ASIDE, At, BadRow, Raw
from llmkit.data.sources import opened
from llmkit.data.text import decoded

WORDS = {
    "unexpected end": "ends within a quote",
    "expected after": "has more behind a closing quote",
    "new-line character": "has a bare carriage return outside of quotes",
}
"""What the parser's own words mean."""


def read_csv(
    path: str, after: At = (), *, delimiter: str | None = None, names: Sequence[str] = (), encoding: str = "utf-8"
) -> Iterator[Raw | BadRow]:
    """The rows of a file under the names in its first line (or `names`); blank lines are passed over.

    Raises:
        DataError: the file cannot be read at all, or what follows a fault has no certain beginning.
    """
    with opened(path, "csv") as file:
        tab = delimiter is None and ".tsv" in PurePosixPath(path).suffixes
        table = _Table("\t" if tab else delimiter or ",", encoding)
        columns = list(names)
        if not columns:
            head = next(table.records(lines(file, path)), None)
            if head is None:
                return
            columns, after = _header(head), after or head.at
        for found in table.records(lines(file, path, *after)):
            yield found if isinstance(found, BadRow) else _row(columns, found)


@dataclass(frozen=True)
class _Record:
    """The fields of a record, its first line, its bytes, and what is behind it."""

    fields: list[str]
    file: str
    line: int
    text: bytes
    at: At


def _header(head: _Record | BadRow) -> list[str]:
    """The names of the columns.

    Raises:
        DataError: they cannot be read, or two are one.
    """
    if isinstance(head, BadRow):
        raise head
    twice = next((name for name in head.fields if head.fields.count(name) > 1), None)
    if twice is not None:
        what = f"names two columns {twice!r}"
        raise DataError(what, fix="name each column once, or set names", file=head.file, line=head.line)
    return head.fields


def _row(columns: Sequence[str], found: _Record) -> Raw | BadRow:
    if len(found.fields) != len(columns):
        what = f"has {len(found.fields)} fields, and there are {len(columns)} columns"
        return BadRow(what, ASIDE, found.file, found.line, found.text, found.at)
    return Raw(dict(zip(columns, found.fields, strict=True)), found.file, found.line, found.text, found.at)


class _Torn(Exception):
    """A line that can be no part of a record, and why."""


class _Table:
    """Makes records of lines, and knows which lines each of them took."""

    def __init__(self, delimiter: str, encoding: str) -> None:
        self.delimiter, self.encoding = delimiter, encoding
        self.taken: list[Line] = []
        self.size = 0

    def records(self, given: Iterator[Line]) -> Iterator[_Record | BadRow]:
        """Each record, or the error that a line is.

        Raises:
            DataError: a record of several lines is bad, so that nobody knows where the next one begins.
        """
        if csv.field_size_limit() < MOST_LINE:
            csv.field_size_limit(MOST_LINE)
        reader = csv.reader(map(self._text, given), delimiter=self.delimiter, strict=True)
        while True:
            self.taken, self.size = [], 0
            try:
                fields = next(reader)
            except StopIteration:
                return
            except (csv.Error, _Torn) as cause:
                yield self._bad(str(cause))
                continue
            if fields:  # a blank line has none
                first, last = self.taken[0], self.taken[-1]
                text = b"".join(line.text for line in self.taken)
                yield _Record(fields, first.file, first.number, text, last.behind)

    def _text(self, line: Line) -> str:
        """A line as text; what it raises comes out of the reader."""
        self.taken.append(line)
        self.size += len(line.text)
        if line.long or self.size > MOST_LINE:
            raise _Torn(TOO_LONG)
        text = decoded(line, self.encoding)
        if isinstance(text, BadRow):
            raise _Torn(text.problems[0].what)
        return text

    def _bad(self, why: str) -> BadRow:
        what = next((ours for theirs, ours in WORDS.items() if theirs in why), why)
        first = self.taken[0]
        if len(self.taken) > 1:
            what = f"opens a quote that goes on to line {self.taken[-1].number}, which {what}"
            raise DataError(what, fix="mend its quotes", file=first.file, line=first.number)
        return first.bad(what, ASIDE)
