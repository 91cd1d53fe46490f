"""What the beginning of a file says of how it is packed. Files of rows are unpacked as streams; archives never are."""

from __future__ import annotations

import stat
from pathlib import Path

MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"BZh": "bzip2",
}
TAR, TAR_AT = b"ustar", 257
START = TAR_AT + len(TAR)
"""Bytes that tell it."""


def packed(start: bytes) -> str:
    """The name of the format, or nothing where the first `START` bytes say none."""
    if start[TAR_AT:].startswith(TAR):
        return "tar"
    return next((name for magic, name in MAGIC.items() if start.startswith(magic)), "")


def packed_file(path: Path) -> str:
    """The same of a file that may be there; nothing of what is no plain file, which is not opened."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return ""
        with path.open("rb") as file:
            return packed(file.read(START))
    except OSError:
        return ""
