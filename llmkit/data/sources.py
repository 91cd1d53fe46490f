"""Opening files of rows: what is something else than its kind says is named before a byte of it is parsed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from llmkit.core.errors import DataError, without_logins
from llmkit.core.packed import START, packed
from llmkit.data import stores
from llmkit.data.rows import At, BadRow, Raw
from llmkit.data.unpack import SUFFIXES, Unpacked

MAGIC = {
    b"PAR1": "parquet",
    b"ARROW1\0\0": "arrow",
    b"\xff\xff\xff\xff": "arrow",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"%PDF-": "PDF",
}
ARCHIVE = "take the files of rows out of the archive, which is not unpacked here"
FIXES = {
    "parquet": "use kind: parquet",
    "arrow": "use kind: arrow",
    "jsonl": "use kind: jsonl",
    "UTF-16 text": "save it as UTF-8",
    "tar": ARCHIVE,
    "zip": ARCHIVE,
    "7z": ARCHIVE,
}
TABLES = ("parquet", "arrow")
"""Kinds that are read here and there, and compressed inside."""

Reader = Callable[[str, At], Iterator[Raw | BadRow]]
"""The rows of one file, behind a place in it."""


def chained(
    paths: str | Sequence[str], read: Reader, after: At = (), take: int | None = None
) -> Iterator[Raw | BadRow]:
    """The rows of all files, one file after the other, at most `take` of them.

    The place of a row is the number of its file, its place in there, and how many rows there are up to it.

    Raises:
        DataError: a file cannot be read, or a glob matches none.
    """
    names = stores.listed(paths)
    first, *within, count = after or (0, 0)
    if take is not None and count >= take:
        return
    for index in range(first, len(names)):
        for row in read(names[index], within if index == first else ()):
            count += 1
            yield placed(row, (index, *row.at, count))
            if count == take:
                return


def placed(row: Raw | BadRow, at: At) -> Raw | BadRow:
    """The row with another place."""
    if isinstance(row, Raw):
        return replace(row, at=at)
    row.at = at
    return row


def digests(paths: str | Sequence[str]) -> dict[str, str]:
    """sha256 of each file by its path."""
    return {without_logins(path): stores.digest(path) for path in stores.listed(paths)}


def marks(paths: str | Sequence[str]) -> dict[str, str]:
    """Size and sha256 of both ends of each file by its path; no file is read as a whole."""
    return {without_logins(path): stores.mark(path) for path in stores.listed(paths)}


def opened(path: str | Path, kind: str) -> BinaryIO:
    """The file of a source of this kind, at its beginning; unpacked, where its name says that it is compressed.

    Raises:
        DataError: it is no file, cannot be read, or is of another format.
    """
    path = str(path)
    file = stores.opened(path)
    form, found = SUFFIXES.get(PurePosixPath(path).suffix, ""), _form(file, kind)
    if form and kind not in TABLES:
        if found != form:
            file.close()
            raise DataError(f"is named as {form} and is none", fix="fetch or write it again", file=path)
        file = io.BufferedReader(Unpacked(file, form, path), 1 << 16)
        found = _form(file, kind)
    if not found or found == kind:
        return file
    file.close()
    raise DataError(f"is {found}, not {kind}", fix=_fix(found, path, kind), file=path, line=1)


def _form(file: BinaryIO, kind: str) -> str:
    """What the beginning of a file says that it is; nothing when it says nothing."""
    start = file.read(START)
    file.seek(0)
    found = packed(start) or next((name for magic, name in MAGIC.items() if start.startswith(magic)), "")
    if found == "bzip2" and kind == "text" and start[4:10] not in (b"1AY&SY", b"\x17rE8P\x90"):
        return ""  # a text may begin with these letters
    objects = start.startswith((b'{"', b"[{")) if kind == "csv" else start[:1] in (b"{", b"[") and kind in TABLES
    return "jsonl" if objects else found


def _fix(found: str, path: str, kind: str) -> str:
    suffix = {form: suffix for suffix, form in SUFFIXES.items()}.get(found)
    if suffix and kind not in TABLES:
        return f"name it {PurePosixPath(path).name}{suffix}"
    return FIXES.get(found, f"unpack it: {found} is not read as {kind}")
