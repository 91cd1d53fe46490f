"""The engine as the server sees it: in a process of its own, which may die and is then started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import count
from typing import Any, Protocol

from llmkit.core.errors import DataError, LlmkitError, ModelError, PeerError, Problem, RecipeError, ResourceError
from llmkit.inference.request import Request
from llmkit.serve.box import Box
from llmkit.serve.messages import event_in, packed, receive, request_out
from llmkit.serve.refusal import Fault, Refusal, problem

LOG = logging.getLogger("llmkit.serve")
PATIENCE = 30.0
"""The longest pause, in seconds, before an engine that keeps dying is started again."""
STEADY = 60.0
"""Seconds after which a start counts as one that went well."""


class Process(Protocol):
    """What runs the engine."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status, once it has one."""
        ...

    def kill(self) -> None:
        """Ends it."""
        ...


Start = Callable[[socket.socket], Process]


def spawn(theirs: socket.socket) -> Process:
    """A new interpreter with one end of a socket and nothing else of ours; the terminal's Ctrl-C does not reach it, not
    even while it imports: what was accepted is finished first."""
    words = [sys.executable, "-m", "llmkit.serve.worker", str(theirs.fileno())]
    return subprocess.Popen(
        words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0
    )


class Remote:
    """An engine that is kept alive."""

    def __init__(self, settings: dict[str, Any], start: Start = spawn) -> None:
        self.settings, self.start = settings, start
        self.facts: dict[str, Any] = {}
        self.stats: dict[str, Any] = {}
        self.ready = False
        self.restarts = 0
        self.process: Process | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.waiting: dict[str, Box] = {}
        self.calls: dict[int, asyncio.Future[Any]] = {}
        self.numbers = count()
        self.on_ready: list[Callable[[], None]] = []
        self.begun: socket.socket | None = None
        """Our end of one that was begun and that nobody reads yet."""
        self.stopped: Refusal | None = None
        """What is said once the server stops."""

    def begin(self) -> None:
        """Starts its process before `keep` does, which goes on with it."""
        self.begun = self._begun()

    def take_back(self) -> None:
        """Ends what was begun, if `keep` never came to it."""
        if self.begun is not None and self.process is not None:
            self.begun.close()
            self.process.kill()

    async def keep(self) -> None:
        """Starts it, and starts it again whenever it dies.

        Raises:
            LlmkitError: it cannot be started at all.
        """
        pause = 0.25
        while True:
            begun = time.monotonic()
            try:
                await self._one()
            except OSError as cause:  # no room for a process, or no descriptors: there may be later
                LOG.error("the engine cannot be started", extra={"why": str(cause)})
            self.restarts += 1
            pause = 0.25 if time.monotonic() - begun > STEADY else min(2 * pause, PATIENCE)
            LOG.error("the engine died; it is started again", extra={"pause": pause, "restarts": self.restarts})
            await asyncio.sleep(pause)

    async def _one(self) -> None:
        """One life of it."""
        ours, self.begun = self.begun or self._begun(), None
        reader, self.writer = await asyncio.open_connection(sock=ours)
        try:
            while True:
                self._take(await receive(reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # it is gone: nothing more comes
        finally:
            self._gone()

    def _begun(self) -> socket.socket:
        """A process that is told what is served; our end of its socket."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self.process = self.start(theirs)
        except OSError:
            ours.close()
            raise
        with contextlib.suppress(OSError):  # it is gone already, which its reader sees
            ours.sendall(packed(self.settings))
        return ours

    def _take(self, message: dict[str, Any]) -> None:
        if "ready" in message and self.stopped is None:
            self.facts, self.ready = message["ready"], True
            for told in self.on_ready:
                told()
        if "failed" in message:
            self._failed(_failure(message))
        for said in message.get("events", ()):
            event = event_in(said)
            if event.request in self.waiting:
                self.waiting[event.request].put(event)
        if "refused" in message and message["refused"] in self.waiting:
            self.waiting[message["refused"]].refuse(_refusal(message["problem"]))
        if "call" in message and (call := self.calls.pop(message["call"], None)) is not None and not call.done():
            _settle(call, message)
        if "stats" in message:
            for fallen in message["stats"].get("fallen", ())[len(self.stats.get("fallen", ())) :]:
                LOG.error("speculation is given up, and answers go on without its drafts", extra={"why": fallen})
            self.stats = message["stats"]

    def _failed(self, cause: LlmkitError) -> None:
        """One that has never run will not run the next time either."""
        if not self.facts:
            raise cause
        LOG.error("the engine failed", extra={"why": str(cause)})

    def _gone(self) -> None:
        """Everybody who waits for it is told at once."""
        self._end(self.stopped or Refusal(503, "the engine died; ask again", code="engine_died", wait=2))
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.writer is not None:
            self.writer.close()

    def stop(self) -> None:
        """The server ends: whoever waits is told that, and nothing is asked any more."""
        self.stopped = Refusal(503, "the server stops; ask again later", code="unavailable", wait=5)
        self._end(self.stopped)

    def _end(self, why: Refusal) -> None:
        self.ready = False
        for box in self.waiting.values():
            box.refuse(why)
        for call in self.calls.values():
            if not call.done():
                call.set_exception(why)
        self.calls.clear()

    @contextlib.asynccontextmanager
    async def ask(self, requests: Sequence[Request], box: Box) -> AsyncIterator[None]:
        """Sends requests; the events of all come into the box. Whoever leaves before the end gives up all of them.

        Raises:
            Refusal: there is no engine now.
        """
        self.waiting |= dict.fromkeys((request.id for request in requests), box)
        try:
            for request in requests:
                self._send({"do": "add", "request": request_out(request)})
            yield
        finally:
            for request in requests:
                del self.waiting[request.id]
                if self.ready:
                    self._send({"do": "abort", "id": request.id})

    async def call(self, verb: str, **asked: Any) -> Any:
        """What the engine's process says to `verb`.

        Raises:
            Refusal: it refuses, or there is none now.
        """
        number = next(self.numbers)
        future = self.calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._send({"do": verb, "call": number, **asked})
            return await future
        finally:
            if self.calls.pop(number, None) is not None and self.ready:
                self._send({"do": "drop", "call": number})  # nobody waits for it any longer

    def _send(self, message: Any) -> None:
        if not self.ready or self.writer is None:
            raise self.stopped or Refusal(503, "the engine is being started; ask again", code="not_ready", wait=2)
        self.writer.write(packed(message))


KINDS = {kind.code: kind for kind in (RecipeError, DataError, ModelError, ResourceError, PeerError)}


def _failure(message: dict[str, Any]) -> LlmkitError:
    """What the engine's process could not do, as if it had been done here."""
    return KINDS.get(message["code"], ModelError)(problems=[Problem(**problem) for problem in message["failed"]])


def _refusal(said: dict[str, Any]) -> Refusal:
    """What the engine refuses; what it is too busy for may be asked again."""
    if "trace" in said:
        return Fault(said["trace"])
    busy = said.pop("busy")
    made = problem(Problem(**said))
    return Refusal(429, made.what, key=made.key, code="adapters_busy", wait=1) if busy else made


def _settle(call: asyncio.Future[Any], message: dict[str, Any]) -> None:
    if "problem" in message:
        call.set_exception(_refusal(message["problem"]))
    else:
        call.set_result(message["value"])
