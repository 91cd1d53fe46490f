"""Compressed files as a stream of what is in them, a little at a time, and not more than they can honestly hold."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from llmkit.core.errors import DataError

SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""What a file must be named to be unpacked: one that is named otherwise was hardly meant to be compressed."""
MOST_RATIO, FREE = 200, 1 << 28
"""A file may unpack to so many times its size; what unpacks to less than `FREE` bytes is let pass."""
PIECE = 1 << 10
"""Bytes that are unpacked together: gzip and zstd make at most some 30 MiB of them."""
MADE = 1 << 22
"""Bytes that bzip2 and xz are asked for at once: a piece of theirs may hold more than a gigabyte."""
MOST_WINDOW = 1 << 27
"""Bytes that a format may look back on, and so keeps."""


def _zstd() -> Any:
    try:
        import zstandard
    except ImportError as missing:
        raise DataError(f".zst needs zstandard ({missing})", fix="pip install zstandard") from missing
    return zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW).decompressobj()


def _xz() -> Any:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_WINDOW)


def _gzip() -> Any:
    return zlib.decompressobj(16 + zlib.MAX_WBITS)


FORMATS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "gzip": (_gzip, ()),
    "bzip2": (bz2.BZ2Decompressor, (MADE,)),
    "xz": (_xz, (MADE,)),
    "zstd": (_zstd, ()),
}
"""What unpacks, and how much it is asked for at once, where it can be."""


class Unpacked(io.RawIOBase):
    """What a compressed file holds. A place behind the present one is gone to by unpacking all before it."""

    def __init__(self, packed: BinaryIO, form: str, name: str) -> None:
        self.packed, self.form, self.file = packed, form, name
        self._begin()

    def _begin(self) -> None:
        (make, self.most), self.within = FORMATS[self.form], False
        self.part = make()
        self.taken = self.given = 0
        self.ready = memoryview(b"")
        self.rest = b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Forward at the price of what lies between; backward from the beginning."""
        return True

    def tell(self) -> int:
        """Bytes given so far."""
        return self.given

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a place, counted from the beginning or from here."""
        place += self.given if whence == io.SEEK_CUR else 0
        if place < self.given:
            self.packed.seek(0)
            self._begin()
        while place > self.given and (skipped := self.read(min(place - self.given, 1 << 20))):
            del skipped
        return self.given

    def readinto(self, buffer: Any) -> int:
        """The next bytes; none at the end.

        Raises:
            DataError: it ends too early, is damaged, or unpacks to far more than it is.
        """
        while not self.ready:
            if not self._next():
                return 0
        size = min(len(buffer), len(self.ready))
        buffer[:size] = self.ready[:size]
        self.ready = self.ready[size:]
        self.given += size
        return size

    def _next(self) -> bool:
        """Unpacks one piece more, or more of the last one; whether there was one."""
        more = not getattr(self.part, "needs_input", True)  # asked for a part, it has not made all of its piece
        piece = b"" if more else self._piece()
        if not piece and not more:
            if self.within:
                raise self._broken("it ends too early")
            return False
        self.within = True
        try:
            made = self.part.decompress(piece, *self.most)
        except Exception as cause:  # each format has an exception of its own
            raise self._broken((str(cause).splitlines() or [type(cause).__name__])[0][:80]) from cause
        if self.part.eof:  # files of one format may be laid end to end
            self.rest, self.part, self.within = self.part.unused_data, FORMATS[self.form][0](), False
        self._check(len(made))
        self.ready = memoryview(made)
        return True

    def _piece(self) -> bytes:
        while piece := self.rest or self.packed.read(PIECE):
            self.taken += 0 if self.rest else len(piece)
            self.rest = b""
            if piece := piece if self.within else piece.lstrip(b"\0"):  # some writers fill the last block
                return piece
        return b""

    def _check(self, more: int) -> None:
        size = self.given + more
        if size > max(FREE, MOST_RATIO * self.taken):
            what = f"unpacks to more than {MOST_RATIO} times its size ({size >> 20} MiB from {self.taken >> 10} KiB)"
            raise DataError(what, fix="check where the file comes from", file=self.file)

    def _broken(self, why: str) -> DataError:
        return DataError(f"is no whole {self.form} file ({why})", fix="fetch or write it again", file=self.file)

    def close(self) -> None:
        """Closes the file too."""
        if not self.closed:
            self.packed.close()
        super().close()
