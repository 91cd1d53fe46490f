"""A connection's sending side: what is written in one turn of the loop goes out together.

To send a part of an answer costs the system more than it costs us to make it, so the head of an answer and its body, or
the parts of several answers of one request, are sent at once.
"""

from __future__ import annotations

import asyncio
from typing import Any

MOST = 64 << 10
"""Bytes that are held at most: then it is heard whether the client reads."""


class Gathered:
    """Around a transport, as which it is used."""

    def __init__(self, own: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.own, self.loop = own, loop
        self.held: list[bytes] = []
        self.size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def write(self, data: bytes) -> None:
        """Sends it before the loop's next turn ends."""
        if not self.held:
            self.loop.call_soon(self.flush)
        self.held.append(data)
        self.size += len(data)
        if self.size >= MOST:
            self.flush()

    def flush(self) -> None:
        """Sends what is held, now."""
        if self.held:
            held, self.held, self.size = self.held, [], 0
            self.own.write(b"".join(held))

    def close(self) -> None:
        """When all is sent."""
        self.flush()
        self.own.close()

    def write_eof(self) -> None:
        """Nothing more is sent after this."""
        self.flush()
        self.own.write_eof()

    def abort(self) -> None:
        """Without what is held."""
        self.held, self.size = [], 0
        self.own.abort()
