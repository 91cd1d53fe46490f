"""The engine's own process: requests come over a socket, events go back, a step at a time; it knows no HTTP."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from llmkit.core.environment import prepare
from llmkit.core.errors import LlmkitError
from llmkit.core.memory import settle
from llmkit.inference.request import Busy, InternalError, Request, alone
from llmkit.serve.messages import Link, event_out, request_in
from llmkit.serve.served import Served, open_served

IDLE = 1.0
"""Seconds that are waited for a message where there is nothing to do: so soon it is seen that a process is gone which
holds the model too."""
PATIENCE = 3600.0
"""The same before it is said what is served."""
SOON = 0.02
"""The same while a call is being carried out beside the steps."""
TELL = 0.25
"""Seconds between two accounts of how the engine does, while it works."""


class Worker:
    """Serves one connection until it closes."""

    def __init__(self, link: Link, served: Served) -> None:
        self.link, self.served = link, served
        self.paused = False
        self.told = 0.0
        self.calls: deque[dict[str, Any]] = deque()
        """Each waits for its turn between two steps, so that many do not keep the others' answers waiting."""
        self.parts: tuple[int, Iterator[None]] | None = None
        """The one that is being carried out in parts, each between two steps."""
        self.beside = ThreadPoolExecutor(2, "beside")
        self.slow: dict[int, Future[Any]] = {}
        """Calls that are carried out while steps go on."""
        self.trying: dict[str, tuple[Request, Future[Any]]] = {}
        """Requests whose grammars are being compiled, or adapters read again, beside the steps."""

    def run(self) -> None:
        """Ready at first; then what is asked, and steps as long as there is work."""
        self.link.send({"ready": self.served.facts(), "stats": self.served.stats()})
        while self.link.open:
            self.served.held.check()
            for message in self.link.read(self._patience()):
                self._do(message)
            if self.parts is not None:
                self._part(*self.parts)
            elif self.calls:
                self._call(self.calls.popleft())
            self._settle()
            self._tried()
            if self._steps:
                with self.served.held.computing():
                    events = self.served.engine.step()
                self._tell({"events": list(map(event_out, events))} if events else {})
        self.beside.shutdown(wait=False)

    @property
    def _steps(self) -> bool:
        return not self.served.engine.idle and not self.paused

    def _patience(self) -> float:
        if self._steps or self.calls or self.parts is not None:
            return 0.0
        return SOON if self.slow or self.trying else IDLE

    def _do(self, message: dict[str, Any]) -> None:
        verb = message["do"]
        if verb == "add":
            self._add(message["request"])
        elif verb == "abort":
            if (tried := self.trying.pop(message["id"], None)) is not None:
                tried[1].cancel()  # others wait for a thread; one that has begun goes on
            self.served.engine.abort(message["id"])
        elif verb == "drop":  # nobody waits for it
            self.calls = deque(call for call in self.calls if call["call"] != message["call"])
            if self.parts is not None and self.parts[0] == message["call"]:
                self.slow.pop(self.parts[0])
                self.parts = None
        else:
            self.calls.append(message)
        self._tell({})

    def _add(self, said: dict[str, Any]) -> None:
        id, engine = said["id"], self.served.engine
        try:
            with alone("it cannot be taken on"):
                request = request_in(said)
                if engine.long(request.sampling, request.adapter):
                    future = self.beside.submit(engine.prepare, request.sampling, request.adapter)
                    self.trying[id] = request, future
                else:
                    engine.add(request)
        except LlmkitError as cause:
            self._refuse(id, cause)

    def _tried(self) -> None:
        """Takes on the requests that are prepared."""
        for id in [id for id, (_, future) in self.trying.items() if future.done()]:
            request, future = self.trying.pop(id)
            try:
                future.result()
                self.served.engine.add(request)
            except LlmkitError as cause:
                self._refuse(id, cause)

    def _refuse(self, id: str, cause: LlmkitError) -> None:
        self.link.send({"refused": id, "problem": _problem(cause)})

    def _call(self, message: dict[str, Any]) -> None:
        verb, number = message.pop("do"), message.pop("call")
        if verb == "pause":
            self.paused = bool(message["on"])
            self.link.send({"call": number, "value": self.paused})
        elif verb in self.served.beside:
            self.slow[number] = self.beside.submit(self.served.beside[verb], message)
        else:
            self.slow[number] = Future()
            self._now(number, verb, message)

    def _now(self, number: int, verb: str, message: dict[str, Any]) -> None:
        with self._of(number):
            parts = self.served.between[verb](message, self.slow[number])
            if parts is not None:
                self._part(number, parts)

    def _part(self, number: int, parts: Iterator[None]) -> None:
        self.parts = None
        with self._of(number):
            if next(parts, self) is None:  # there is more of it
                self.parts = number, parts

    @contextmanager
    def _of(self, number: int) -> Iterator[None]:
        """What fails inside is told to who called."""
        try:
            with alone("it cannot be carried out"):
                yield
        except LlmkitError as cause:
            self.slow[number].set_exception(cause)

    def _settle(self) -> None:
        """Tells what came of calls that are done."""
        for number in [number for number, future in self.slow.items() if future.done()]:
            try:
                with alone("it cannot be carried out"):
                    said = {"value": self.slow.pop(number).result()}
            except LlmkitError as cause:
                said = {"problem": _problem(cause)}
            self.link.send({"call": number, **said})

    def _tell(self, message: dict[str, Any]) -> None:
        """A message, with an account where the last one is old or nothing more will come for now."""
        now = time.monotonic()
        if self.served.engine.idle or now - self.told > TELL:
            self.told = now
            message = message | {"stats": self.served.stats()}
        if message:
            self.link.send(message)


def _problem(cause: LlmkitError) -> dict[str, Any]:
    if isinstance(cause, InternalError):  # all of it, for the log
        return {"trace": cause.trace}
    problem = cause.problems[0]  # without its file: no places of this machine
    return {"what": problem.what, "fix": problem.fix, "key": problem.key, "busy": isinstance(cause, Busy)}


def serve(own: socket.socket) -> int:
    """The first message says what is served; gives the exit status."""
    own.setblocking(True)
    link = Link(own)
    settings = link.first(PATIENCE)
    if settings is None:
        return 0
    try:
        served = open_served(settings)
        settle()
        Worker(link, served).run()
    except LlmkitError as cause:
        link.send({"failed": [vars(problem) for problem in cause.problems], "code": cause.code})
        own.close()  # whoever waits hears it now, and not when all that there was is cleared away
        return cause.code
    served.held.close()
    return 0


def main(number: int) -> int:
    """A process of its own over a socket that it was given: it ends with its server, not by the terminal's Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.getLogger("llmkit").addHandler(logging.NullHandler())  # the server tells what is to be told
    prepare(remote=os.environ.get("HF_HUB_OFFLINE") != "1")
    return serve(socket.socket(fileno=number))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
