"""What an Arrow message says that it unpacks to, read from its header before anything is unpacked."""

from __future__ import annotations

import struct
from typing import Any

DICTIONARY, RECORDS = 2, 3
"""Types of messages."""


def claimed(header: bytes, body: Any) -> int:
    """Bytes of a message's buffers once they are unpacked; `body` holds them as they are.

    A compressed buffer begins with its size (Arrow's columnar format, "Buffer compression"); -1: it is not compressed.

    Raises:
        ValueError: the header is damaged.
    """
    try:
        message = _Table(header, struct.unpack_from("<I", header)[0])
        kind = header[message.field(1)] if message.field(1) else 0
        if kind not in (DICTIONARY, RECORDS):
            return 0
        batch = message.table(2)
        if kind == DICTIONARY:
            batch = batch.table(1)
        packed, total = batch.field(3) != 0, 0
        for offset, size in batch.pairs(2):
            total += _unpacked(body, offset, size) if packed and size >= 8 else size
        return total
    except (struct.error, IndexError) as cause:
        raise ValueError("a header is damaged") from cause


def _unpacked(body: Any, offset: int, size: int) -> int:
    said: int = struct.unpack("<q", bytes(body[offset : offset + 8]))[0]
    return size if said < 0 else said


class _Table:
    """A table of a flatbuffer: its fields by number."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self.names = at - struct.unpack_from("<i", data, at)[0]

    def field(self, number: int) -> int:
        """Where a field is; 0 when it is not there."""
        if 4 + 2 * number >= struct.unpack_from("<H", self.data, self.names)[0]:
            return 0
        offset: int = struct.unpack_from("<H", self.data, self.names + 4 + 2 * number)[0]
        return self.at + offset if offset else 0

    def table(self, number: int) -> _Table:
        """A field that is a table."""
        place = self.field(number)
        if not place:
            raise IndexError(number)
        return _Table(self.data, place + struct.unpack_from("<I", self.data, place)[0])

    def pairs(self, number: int) -> list[tuple[int, int]]:
        """A field that is a list of two numbers each."""
        place = self.field(number)
        if not place:
            return []
        place += struct.unpack_from("<I", self.data, place)[0]
        count = struct.unpack_from("<I", self.data, place)[0]
        return [struct.unpack_from("<qq", self.data, place + 4 + 16 * i) for i in range(count)]
