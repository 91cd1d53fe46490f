"""What must hold of an answer, whatever was asked."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.serve.mutated import Case

HANGS = 5.0
"""Seconds that no answer may take."""


@dataclass(frozen=True)
class Answer:
    status: int
    head: bytes
    body: bytes
    seconds: float


def ask(url: str, wire: bytes) -> Answer:
    """All that comes until the other side closes."""
    host, _, port = url.removeprefix("http://").partition(":")
    began, came = time.monotonic(), bytearray()
    with socket.create_connection((host, int(port)), 60) as own:
        with contextlib.suppress(ConnectionError):  # it may be refused before all of it is there
            own.sendall(wire)
        with contextlib.suppress(ConnectionResetError):
            while part := own.recv(1 << 16):
                came += part
    head, _, body = bytes(came).partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):  # the answer comes after it
        head, _, body = body.partition(b"\r\n\r\n")
    seconds = time.monotonic() - began
    if b"transfer-encoding: chunked" in head.lower():
        body = joined(body)
    return Answer(int(head.split()[1]) if head else 0, head, body, seconds)


def joined(body: bytes) -> bytes:
    """Of chunks, what is in them."""
    made = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        count = int(size, 16)
        made, body = made + body[:count], body[count + 2 :]
    return made


def strict(text: bytes) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in an answer")

    return json.loads(text.decode("utf-8"), parse_constant=refuse)


def wrong(case: Case, answer: Answer, most: float = HANGS) -> str:
    """What is wrong with an answer that may take so many seconds; nothing if it is as it must be."""
    if answer.status >= 500:
        return f"status {answer.status}: {answer.body[:300]!r}"
    if not 200 <= answer.status < 500:
        return f"status {answer.status}"
    if answer.seconds > most:
        return f"{answer.seconds:.1f} s"
    if case.method == "HEAD":
        return "a body after HEAD" if answer.body else ""
    kind = next((line for line in answer.head.lower().split(b"\r\n") if line.startswith(b"content-type:")), b"")
    if answer.status >= 400:
        error = strict(answer.body)["error"]
        good = set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
        return "" if good and b"Traceback" not in answer.body and b".py" not in answer.body else f"error {error}"
    if b"event-stream" in kind:
        return streamed(case, answer.body)
    if b"json" in kind:
        strict(answer.body)
    return ""


def streamed(case: Case, body: bytes) -> str:
    """A stream ends with its mark, or with an error that is none of the server's own."""
    events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    told = [strict(one) for one in events if one != b"[DONE]"]
    errors = [one for one in told if "error" in one and one.get("type") in (None, "error")]
    if any(one["error"].get("type") == "server_error" for one in errors):
        return f"error in a stream: {errors}"
    last = events[-1] == b"[DONE]" or "response." in str(told[-1].get("type"))
    return "" if errors or last else "a stream that breaks off"


@dataclass
class Tally:
    """Of many answers."""

    statuses: dict[int, int] = field(default_factory=dict)
    slowest: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, number of the case), the ten longest."""

    def take(self, number: int, answer: Answer) -> None:
        self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
        self.slowest = sorted([*self.slowest, (answer.seconds, number)], reverse=True)[:10]


@dataclass(frozen=True)
class Target:
    """A server that is under fire: its two listeners, and whether it holds nothing and has lost nothing."""

    url: str
    admin: str
    key: str
    chief: str
    """The key of its admins."""
    left: Callable[[], dict[str, float]]
    """What it holds for requests, by name, and how often its engine died: all 0 when all is over."""

    def canary(self) -> str:
        """The same each time, to the bit."""
        head = {"authorization": f"Bearer {self.key}"}
        said = httpx.post(self.url + "/v1/completions", json=CANARY, headers=head, timeout=60)
        return json.dumps(said.json()["choices"])

    def settled(self) -> dict[str, float]:
        """What is left after a while."""
        end = time.monotonic() + 10
        while any(self.left().values()) and time.monotonic() < end:
            time.sleep(0.1)
        return {name: value for name, value in self.left().items() if value}


CANARY = {"prompt": "the quick brown", "max_tokens": 12, "temperature": 0, "logprobs": 3, "ignore_eos": True}


def held(server: Any) -> dict[str, float]:
    """Of a server in this process."""
    gate, engine = server.service.gate, server.engine
    kept = {"answers": sum(gate.answers.values()), "tokens": sum(gate.tokens.values()), "used": engine.stats["used"]}
    return kept | {"waiting": len(engine.waiting), "calls": len(engine.calls), "restarts": engine.restarts}
