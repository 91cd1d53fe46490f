"""The engine's own process: requests come over a socket, events go back, a step at a time; it knows no HTTP."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from llmkit.core.environment import prepare
from llmkit.core.errors import LlmkitError
from llmkit.serve.messages import Link, event_out, request_in
from llmkit.serve.served import Served, open_served

IDLE = 3600.0
"""Seconds that are waited for a message where there is nothing to do."""
TELL = 0.25
"""Seconds between two accounts of how the engine does, while it works."""


class Worker:
    """Serves one connection until it closes."""

    def __init__(self, link: Link, served: Served) -> None:
        self.link, self.served = link, served
        self.paused = False
        self.told = 0.0
        self.verbs: Mapping[str, Callable[[dict[str, Any]], Any]] = {"pause": self._pause, **served.verbs}

    def run(self) -> None:
        """Ready at first; then what is asked, and steps as long as there is work."""
        self.link.send({"ready": self.served.facts()})
        engine = self.served.engine
        while self.link.open:
            busy = not engine.idle and not self.paused
            for message in self.link.read(0.0 if busy else IDLE):
                self._do(message)
            if not engine.idle and not self.paused:
                events = engine.step()
                self._tell({"events": list(map(event_out, events))} if events else {})

    def _do(self, message: dict[str, Any]) -> None:
        verb = message.pop("do")
        if verb == "add":
            self._add(message["request"])
        elif verb == "abort":
            self.served.engine.abort(message["id"])
        else:
            self._answer(message.pop("call"), verb, message)
        self._tell({})

    def _add(self, said: dict[str, Any]) -> None:
        id = said["id"]
        try:
            self.served.engine.add(request_in(said))
        except LlmkitError as cause:
            self.link.send({"refused": id, "problem": _problem(cause)})

    def _answer(self, call: int, verb: str, asked: dict[str, Any]) -> None:
        try:
            self.link.send({"call": call, "value": self.verbs[verb](asked)})
        except LlmkitError as cause:
            self.link.send({"call": call, "problem": _problem(cause)})

    def _pause(self, asked: dict[str, Any]) -> bool:
        self.paused = bool(asked["on"])
        return self.paused

    def _tell(self, message: dict[str, Any]) -> None:
        """A message, with an account where the last one is old or nothing more will come for now."""
        now = time.monotonic()
        if self.served.engine.idle or now - self.told > TELL:
            self.told = now
            message = message | {"stats": self.served.stats()}
        if message:
            self.link.send(message)


def _problem(cause: LlmkitError) -> dict[str, str]:
    problem = cause.problems[0]
    return {"what": problem.what, "fix": problem.fix, "key": problem.key}


def serve(own: socket.socket) -> int:
    """The first message says what is served; gives the exit status."""
    own.setblocking(True)
    link = Link(own)
    settings = next(iter(link.read(IDLE)), None)
    if settings is None:
        return 0
    try:
        served = open_served(settings)
    except LlmkitError as cause:
        link.send({"failed": [vars(problem) for problem in cause.problems], "code": cause.code})
        return cause.code
    Worker(link, served).run()
    return 0


def main(number: int) -> int:
    """A process of its own over a socket that it was given: it ends with its server, not by the terminal's Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
    prepare()
    return serve(socket.socket(fileno=number))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
