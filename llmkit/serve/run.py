"""The server as it runs: its socket, its engine, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from llmkit.core.errors import RecipeError
from llmkit.serve.node import Bounds
from llmkit.serve.remote import Remote

LOG = logging.getLogger("llmkit.serve")


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, before anything is loaded.

    Raises:
        RecipeError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        own = socket.socket(family, socket.SOCK_STREAM)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain; the second ends at once."""
        if sig == signal.SIGHUP:
            return
        self.on_signal()


def configured(app: ASGIApp, bounds: Bounds) -> uvicorn.Config:
    """How uvicorn is told of our bounds."""
    return uvicorn.Config(
        app,
        http="h11",
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


async def run(
    app: ASGIApp, own: socket.socket, engine: Remote, bounds: Bounds, busy: Callable[[], int], drain: Callable[[], None]
) -> None:
    """Serves until a signal, then finishes what was accepted.

    Raises:
        LlmkitError: the engine cannot be started.
    """
    begun = asyncio.Event()

    def stop() -> None:
        if begun.is_set():
            server.should_exit = server.force_exit = True
        loop.call_soon_threadsafe(begun.set)

    loop, server = asyncio.get_running_loop(), Listener(configured(app, bounds), stop)
    keeping, serving = asyncio.create_task(engine.keep()), asyncio.create_task(server.serve([own]))
    ending = asyncio.create_task(_drained(begun, bounds.drain, busy, drain))
    try:
        await asyncio.wait((keeping, serving, ending), return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            keeping.result()
    finally:
        server.should_exit = True
        await _over(serving)
        for task in (keeping, ending):
            task.cancel()
        await asyncio.gather(keeping, ending, return_exceptions=True)


async def _drained(begun: asyncio.Event, most: float, busy: Callable[[], int], drain: Callable[[], None]) -> None:
    await begun.wait()
    drain()
    end = asyncio.get_running_loop().time() + most
    while busy() and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.05)


async def _over(serving: Awaitable[None]) -> None:
    await asyncio.gather(serving, return_exceptions=True)
