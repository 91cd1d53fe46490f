"""What goes between this process and its helpers: rows and chunks as bytes, over a pair of sockets.

The bytes are `marshal`'s, of plain values alone: both ends are one program, and nothing of it is kept.
"""

from __future__ import annotations

import marshal
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from llmkit.data.chunk import Chunk
from llmkit.data.rows import BadRow, Raw

_LENGTH = struct.Struct("<Q")
_RAW = tuple(f.name for f in fields(Raw))


class Late(Exception):
    """The other end does not answer in time."""


class Pipe:
    """One end of a pair: messages of bytes."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        end.setblocking(False)

    @staticmethod
    def pair() -> tuple[Pipe, Pipe]:
        """Two ends."""
        one, other = socket.socketpair()
        return Pipe(one), Pipe(other)

    def close(self) -> None:
        """No more is sent or received."""
        self.end.close()

    def send(self, said: bytes, seconds: float | None) -> None:
        """Sends a message.

        Raises:
            Late: the other end takes nothing for so many seconds.
            OSError: there is no other end.
        """
        view = memoryview(_LENGTH.pack(len(said)) + said)
        while view:
            self._ready(seconds, write=True)
            view = view[self.end.send(view) :]

    def receive(self, seconds: float | None) -> bytes:
        """The next message.

        Raises:
            Late: there is none for so many seconds.
            EOFError: the other end is gone.
        """
        (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size, seconds))
        return bytes(self._exactly(size, seconds))

    def _exactly(self, size: int, seconds: float | None) -> bytearray:
        held = bytearray(size)
        view = memoryview(held)
        while view:
            self._ready(seconds)
            got = self.end.recv_into(view)
            if not got:
                raise EOFError
            view = view[got:]
        return held

    def _ready(self, seconds: float | None, write: bool = False) -> None:
        poll = select.poll()
        poll.register(self.end, select.POLLOUT if write else select.POLLIN)
        until = None if seconds is None else time.monotonic() + seconds
        while not poll.poll(None if until is None else max(0, until - time.monotonic()) * 1000):
            if until is not None and time.monotonic() >= until:
                raise Late


def packed_rows(rows: Sequence[Raw | BadRow], base: int) -> bytes:
    """Rows as bytes.

    Raises:
        ValueError: one holds what is no plain value.
    """
    return marshal.dumps((base, [_row(row) for row in rows]))


def read_rows(said: bytes) -> tuple[list[Raw | BadRow], int]:
    """(rows, the number of the first)."""
    base, rows = marshal.loads(said)
    return [Raw(*row) if len(row) == len(_RAW) else _bad(row) for row in rows], base


def packed_chunk(made: Chunk) -> bytes:
    """A chunk as bytes."""
    held = {f.name: getattr(made, f.name) for f in fields(Chunk)}
    held |= {"ids": made.ids.tobytes(), "weights": made.weights.tobytes(), "bad": [_row(row) for row in made.bad]}
    return marshal.dumps(held)


def read_chunk(said: bytes) -> Chunk | None:
    """The chunk again; None where it could not be made."""
    if not said:
        return None
    held: dict[str, Any] = marshal.loads(said)
    held["ids"], held["weights"] = np.frombuffer(held["ids"], np.int32), np.frombuffer(held["weights"], np.float32)
    return Chunk(**held | {"bad": [_bad(row) for row in held["bad"]]})


def _row(row: Raw | BadRow) -> tuple[Any, ...]:
    if isinstance(row, Raw):
        return tuple(getattr(row, name) for name in _RAW)
    problem = row.problems[0]
    return problem.what, problem.fix, problem.file, problem.line, row.text, tuple(row.at), None, None, None


def _bad(row: tuple[Any, ...]) -> BadRow:
    return BadRow(*row[:6])
