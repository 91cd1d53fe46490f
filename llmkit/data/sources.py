"""Opening a file of rows: what is something else than its kind says is named before a byte of it is parsed."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import BinaryIO

from llmkit.core.errors import DataError

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


def opened(path: Path, kind: str) -> BinaryIO:
    """The file of a source of this kind, at its beginning.

    Raises:
        DataError: it is no file, cannot be read, or is of another format.
    """
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
