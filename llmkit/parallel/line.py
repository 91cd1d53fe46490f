"""JSON objects, a line each, over a socket that is never waited for."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

MOST = 1 << 20
"""Bytes of a line, and of what waits to be sent: who says more is none of ours, or does not listen."""


class Line:
    """One end of a connection. `lost` says that the other end is gone."""

    def __init__(self, made: socket.socket) -> None:
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.lost = made, False
        self._heard, self._unsent = b"", b""
        self._saying = threading.Lock()  # the main thread says its phases itself

    def say(self, value: Any) -> None:
        """Sends a value, now or when there is room; what a deaf other end has no room for is left out."""
        with self._saying:
            if len(self._unsent) < MOST:
                self._unsent += json.dumps(value).encode() + b"\n"
            self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent and not self.lost:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self.lost = True

    def hear(self) -> Iterator[Any]:
        """The values that have come; the last ones of an end that is gone too."""
        for _ in range(MOST >> 16):  # what is left comes with the next look
            if self.lost:
                break
            try:
                part = self.socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                part = b""
            self._heard += part
            self.lost = not part
        *whole, self._heard = self._heard.split(b"\n")
        self.lost |= len(self._heard) > MOST
        for line in whole:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):  # whoever says that is none of ours, and must not end the watch
                self.lost = True

    def close(self) -> None:
        """Hangs up."""
        self.socket.close()
