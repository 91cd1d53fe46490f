"""HTTP/1.1 with bounds: on heads that do not end, bodies that nobody wants or that are all chunks, slow readers."""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmkit.serve.gathered import Gathered
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import Refusal

RESERVE = 32
"""File descriptors that are kept for what is not a connection."""
RESET = struct.pack("ii", 1, 0)
LINGER = 2.0
"""Seconds in which the rest of a body that was refused is read away, so that its client sees why."""
AWAY = 64 << 20
"""Bytes of it that are read away at most: nobody keeps a server reading as fast as it can."""
CHUNKS, LEAST = 1024, 256
"""Chunks of a body that may be of any size; beyond them there is one for each so many bytes."""


def most_connections(bounds: Bounds) -> int:
    """As many as are allowed and as there are file descriptors for."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, min(bounds.connections, soft - RESERVE))


def most_turned_away(most: int) -> int:
    """How many connections beyond `most` may stay until they have heard that they are too many."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(0, min(most, soft - RESERVE - most))


class Strict(h11.Connection):
    """h11's side of a connection, which holds the bound on heads where one comes in a single read too, and takes no
    body of very many chunks with next to nothing in them: each costs as much as a large one, and a read holds tens of
    thousands."""

    chunks, size = 0, 0
    refusal = Refusal(400, "the request is no HTTP that is taken")
    """What is said of what was refused."""

    def __init__(self, most: int) -> None:
        """`most`: bytes of a head."""
        super().__init__(h11.SERVER, most)
        self.most = most

    def next_event(self) -> Any:
        """
        Raises:
            h11.RemoteProtocolError: what came is no HTTP, has too long a head, or such a body.
        """
        before, idle = len(self._receive_buffer), self.their_state is h11.IDLE
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as cause:
            if idle and cause.error_status_hint == 431:  # it has not ended, and is longer already
                self._too_long()
            raise
        if isinstance(event, h11.Request | h11.EndOfMessage) and before - len(self._receive_buffer) > self.most:
            self._too_long()  # h11 looks at the size of what has not ended alone
        if isinstance(event, h11.Request):
            self.chunks = self.size = 0
        elif isinstance(event, h11.Data) and event.chunk_end:
            self.chunks, self.size = self.chunks + 1, self.size + len(event.data)
            if self.chunks > CHUNKS + self.size // LEAST:
                raise h11.RemoteProtocolError("too many chunks with too little in them")
        return event

    def _too_long(self) -> NoReturn:
        what = f"the head of the request, its path and headers, is longer than {self.most} bytes"
        self.refusal = Refusal(431, what, code="head_too_large")
        raise h11.RemoteProtocolError(what, error_status_hint=431)


class Bounded(H11Protocol):
    """uvicorn's protocol under our bounds."""

    bounds = Bounds()
    leaving: ClassVar[set[Bounded]] = set()
    """Those that were turned away and are there still."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """One more is there, or too many."""
        self.gathered = Gathered(cast(asyncio.Transport, transport), self.loop)
        super().connection_made(cast(asyncio.Transport, self.gathered))
        self.conn = Strict(self.bounds.header)
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self.away = AWAY
        most = most_connections(self.bounds)
        if len(self.connections) - len(self.leaving) > most:
            self._turn_away(stay=len(self.leaving) < most_turned_away(most))
        else:
            self._in("head", self.bounds.receive, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any longer."""
        for name in list(self.timers):
            self._never(name)
        self.leaving.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The head of a request has its time, from its first byte on."""
        if self.transport.is_closing():
            return
        if self not in self.leaving:
            super().data_received(data)
        if "linger" in self.timers:
            self.away -= len(data)
            if self.away < 0:
                self._leave()
        if self.conn.their_state is not h11.IDLE:
            self._never("head")
        elif "head" not in self.timers and self.conn.trailing_data[0]:
            self._in("head", self.bounds.receive, self.transport.abort)

    def pause_writing(self) -> None:
        """The client does not read: it has its time to go on."""
        super().pause_writing()
        self._in("stall", self.bounds.stall, self._let_go)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._never("stall")

    def on_response_complete(self) -> None:
        """An answer that came before the end of the body: the rest is read away for a while."""
        self.gathered.flush()
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._in("linger", LINGER, self._leave)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or has too long a head."""
        self._last_words(cast(Strict, self.conn).refusal)

    def _let_go(self) -> None:
        """Reset, not closed: a closed one would keep what it has not read with the system for minutes."""
        own = self.transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    def _leave(self) -> None:
        if self in self.leaving or self.conn.their_state is h11.SEND_BODY:
            self.transport.close()

    def _turn_away(self, stay: bool) -> None:
        """One too many. Its request is on its way: were the connection closed before that is read, the system might
        take back what is said here, so it is read away."""
        self.leaving.add(self)
        words = self._words(Refusal(503, "too many connections; come back later", code="overloaded", wait=1))
        self.transport.write(words)
        if stay:
            self.transport.write_eof()
            self._in("linger", LINGER, self._leave)
        else:
            self.transport.close()

    def _last_words(self, refusal: Refusal) -> None:
        try:
            self.transport.write(self._words(refusal))
        except h11.LocalProtocolError:  # in the middle of an answer: there is no way to say it
            self.transport.abort()
        self.transport.close()

    def _words(self, refusal: Refusal) -> bytes:
        head = [("content-type", "application/json"), ("connection", "close"), *refusal.headers.items()]
        parts: list[Any] = [
            h11.Response(status_code=refusal.status, headers=[*head, ("content-length", str(len(refusal.body)))]),
            h11.Data(data=refusal.body),
            h11.EndOfMessage(),
        ]
        return b"".join(self.conn.send(part) or b"" for part in parts)

    def _in(self, name: str, seconds: float, what: Callable[[], None]) -> None:
        self._never(name)
        self.timers[name] = self.loop.call_later(seconds, what)

    def _never(self, name: str) -> None:
        if (timer := self.timers.pop(name, None)) is not None:
            timer.cancel()


def bounded(bounds: Bounds) -> type[Bounded]:
    """The protocol under these bounds."""
    return type("Bounded", (Bounded,), {"bounds": bounds, "leaving": set()})
