"""A client that costs little: requests by chance over sockets that are waited for together, and read when all is over.

Each has a connection of its own, which the server ends. What is parsed is parsed afterwards: while the flood lasts the
client has next to nothing to do but to note when the first byte of an answer came.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.serve.crowd import Came, read_answer

PATIENCE = 120.0
"""Seconds after the last request in which an answer comes to its end."""


@dataclass
class Shot:
    """One request, on its way or over."""

    due: float
    own: socket.socket
    left: memoryview
    """Of what is sent."""
    began: float = field(default_factory=time.monotonic)
    first: float = 0.0
    """When the answer began."""
    held: list[bytes] = field(default_factory=list)
    error: str = ""

    def work(self, events: int) -> bool:
        """Sends and reads what can be; whether it is over."""
        try:
            if events & select.EPOLLOUT and self.left:
                self.left = self.left[self.own.send(self.left) :]
            if events & ~select.EPOLLOUT:
                if not (part := self.own.recv(1 << 16)):
                    return True
                self.first = self.first or time.monotonic()
                self.held.append(part)
        except BlockingIOError:
            pass
        except OSError as cause:
            self.error = errno.errorcode.get(cause.errno or 0, "OSError")
            if events & ~select.EPOLLOUT or cause.errno != errno.EPIPE:
                return True  # where sending alone failed, there may be an answer to read
            self.left = memoryview(b"")
        return False

    def came(self) -> Came:
        """What came of it."""
        came = Came(seconds=self.first - self.began, error="" if self.held else self.error or "nothing came")
        if self.held:
            asyncio.run(read_answer(b"".join(self.held), came))
        came.seconds = self.first - self.began
        return came


def flood(address: tuple[str, int], asked: Sequence[bytes], rate: float) -> list[Shot]:
    """Each when it is due, whatever became of those before: a Poisson process of `rate` a second."""
    rng, poll, open_, made = random.Random(0), select.epoll(), dict[int, Shot](), list[Shot]()
    due = time.monotonic()
    dues = [due := due + rng.expovariate(rate) for _ in asked]
    while len(made) < len(asked) or open_:
        now = time.monotonic()
        while len(made) < len(asked) and dues[len(made)] <= now:
            shot = _begun(address, dues[len(made)], asked[len(made)])
            made.append(shot)
            open_[shot.own.fileno()] = shot
            poll.register(shot.own, select.EPOLLIN | select.EPOLLOUT)
        if now > dues[-1] + PATIENCE:
            break
        wait = dues[len(made)] - time.monotonic() if len(made) < len(asked) else 1.0
        for number, events in poll.poll(max(0.0, wait)):
            _go_on(poll, open_, number, events)
    for shot in open_.values():
        shot.error = "no end"
        shot.own.close()
    return made


def _begun(address: tuple[str, int], due: float, asked: bytes) -> Shot:
    own = socket.socket()
    own.setblocking(False)
    shot = Shot(due, own, memoryview(asked))
    with contextlib.suppress(BlockingIOError):
        own.connect(address)
    return shot


def _go_on(poll: select.epoll, open_: dict[int, Shot], number: int, events: int) -> None:
    shot, before = open_[number], len(open_[number].left)
    if shot.work(events):
        del open_[number]
        poll.unregister(number)
        shot.own.close()
    elif before and not shot.left:
        poll.modify(number, select.EPOLLIN)
