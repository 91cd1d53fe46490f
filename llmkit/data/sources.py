"""Opening a file of rows: what is something else than its kind says is named before a byte of it is parsed."""

from __future__ import annotations

import glob
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from llmkit.core.errors import DataError
from llmkit.core.files import sha256
from llmkit.data.rows import At, BadRow, Raw

MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
FIXES = {
    "parquet": "use kind: parquet",
    "arrow": "save it as parquet",
    "jsonl": "use kind: jsonl",
    "UTF-16 text": "save it as UTF-8",
}


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
    names = listed(paths)
    first, *within, count = after or (0, 0)
    if take is not None and count >= take:
        return
    for index in range(first, len(names)):
        for row in read(names[index], within if index == first else ()):
            count += 1
            yield _placed(row, (index, *row.at, count))
            if count == take:
                return


def _placed(row: Raw | BadRow, at: At) -> Raw | BadRow:
    if isinstance(row, Raw):
        return replace(row, at=at)
    row.at = at
    return row


def listed(paths: str | Sequence[str]) -> list[str]:
    """The files of a path, a glob or a list of these; those of a glob in the order of their names.

    Raises:
        DataError: a glob matches no file.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        pattern = glob.has_magic(path) and not Path(path).exists()
        matched = sorted(glob.glob(path, recursive=True)) if pattern else [path]  # noqa: PTH207 - it may be absolute
        if not matched:
            raise DataError("matches no file", fix="mend its path in the recipe", file=path)
        found += matched
    return found


def digests(paths: str | Sequence[str]) -> dict[str, str]:
    """sha256 of each file by its path."""
    return {path: sha256(Path(path)) for path in listed(paths)}


def opened(path: str | Path, kind: str) -> BinaryIO:
    """The file of a source of this kind, at its beginning.

    Raises:
        DataError: it is no file, cannot be read, or is of another format.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(
            path.stat().st_mode
        ):  # a pipe may never end, and what was read is read again for its sha256
            raise DataError("is no plain file", fix="give the path of a file", file=str(path))
        file = path.open("rb")
    except OSError as cause:
        raise unreadable(path, cause) from cause
    start = file.read(8)
    file.seek(0)
    found = next((name for magic, name in MAGIC.items() if start.startswith(magic)), "")
    if kind == "parquet" and start[:1] in (b"{", b"["):
        found = "jsonl"
    if not found or found == kind:
        return file
    file.close()
    fix = FIXES.get(found, f"unpack it: {found} is not read in this version")
    raise DataError(f"is {found}, not {kind}", fix=fix, file=str(path), line=1)


def unreadable(path: Path, cause: OSError) -> DataError:
    """The error for a file that the operating system refuses."""
    return DataError(f"cannot be read ({cause.strerror})", fix="mend its path in the recipe", file=str(path))
