"""Waiting for something to read."""

from __future__ import annotations

import select
import socket
from typing import IO


def readable(file: IO[bytes] | socket.socket, seconds: float) -> bool:
    """Whether there is something to read, or its end, within so many seconds. `select` knows no file whose number is
    past 1023, and a server has more."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(1000 * max(0.0, seconds)))
