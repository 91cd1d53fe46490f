"""The server as it runs: its socket, its engine, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from llmkit.core.errors import RecipeError
from llmkit.serve.door import Door
from llmkit.serve.node import Bounds
from llmkit.serve.protocol import bounded
from llmkit.serve.remote import Remote

LOG = logging.getLogger("llmkit.serve")

MOMENT = 1.0
"""Seconds in which an end is told to those who wait still."""
SENDS = 256 << 10
"""Bytes that the system keeps of one client's answer; it lets them grow to megabytes where a client does not read."""


AT_ONCE, WAITING = 32, 2048
"""Connections that are taken in one turn of the loop, so that those that were are answered before more come; and those
that wait in the system for it."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, before anything is loaded.

    Raises:
        RecipeError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        own = socket.socket(family, socket.SOCK_STREAM)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENDS)  # those that are accepted have it from here
        own.bind((host, port))
    except OSError as cause:
        what = f"{host}:{port} cannot be listened on: {cause.strerror or cause}"
        raise RecipeError(what, fix="give another --host or --port", key="port") from cause
    return own


class Listener(uvicorn.Server):
    """A uvicorn server that goes on answering while what was accepted is finished."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_signal = on_signal

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """asyncio takes as many connections in a turn as it lets wait: so the system is told the latter once more."""
        await super().startup(sockets)
        for own in sockets or ():
            own.listen(WAITING)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain; the second ends at once."""
        self.on_signal()


def configured(app: ASGIApp, bounds: Bounds) -> uvicorn.Config:
    """How uvicorn is told of our bounds."""
    return uvicorn.Config(
        app,
        http=bounded(bounds),
        backlog=AT_ONCE,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=bounds.header,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )


@dataclass(frozen=True)
class Place:
    """Where something is served."""

    door: Door
    own: socket.socket


async def run(places: Sequence[Place], engine: Remote, bounds: Bounds) -> None:
    """Serves until a signal, then finishes what was accepted.

    Raises:
        LlmkitError: the engine cannot be started.
    """
    loop, begun = asyncio.get_running_loop(), asyncio.Event()
    again: list[bool] = []

    def stop() -> None:
        again.append(begun.is_set())
        loop.call_soon_threadsafe(begun.set)

    servers = [Listener(configured(place.door, bounds), stop) for place in places]
    serving = [asyncio.create_task(one.serve([place.own])) for one, place in zip(servers, places, strict=True)]
    keeping = asyncio.create_task(engine.keep())
    ending = asyncio.create_task(_drained(begun, bounds.drain, places, again))
    try:
        await asyncio.wait((keeping, ending, *serving), return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            keeping.result()
    finally:
        engine.stop()
        await _left(places)
        for server in servers if any(place.door.inside for place in places) else ():
            for connection in list(server.server_state.connections):  # they do not read, or are not done with asking
                connection.transport.abort()
        await _left(places)
        for server in servers:
            server.should_exit, server.force_exit = True, any(again)
        await asyncio.gather(*serving, return_exceptions=True)
        for task in (keeping, ending):
            task.cancel()
        await asyncio.gather(keeping, ending, return_exceptions=True)


async def _left(places: Sequence[Place]) -> None:
    """Until those who were told that nothing more comes have heard it, or a moment has passed."""
    end = asyncio.get_running_loop().time() + MOMENT
    while any(place.door.inside for place in places) and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.01)


async def _drained(begun: asyncio.Event, most: float, places: Sequence[Place], again: list[bool]) -> None:
    """Until nothing that was accepted is left, or too long has passed; new requests are told to go elsewhere."""
    await begun.wait()
    for place in places:
        place.door.service.draining = True
    LOG.info("draining", extra={"inside": sum(place.door.inside for place in places)})
    end = asyncio.get_running_loop().time() + most
    while any(place.door.inside for place in places) and not any(again):
        if asyncio.get_running_loop().time() >= end:
            LOG.error("not all that was accepted is finished in time", extra={"seconds": most})
            return
        await asyncio.sleep(0.02)
