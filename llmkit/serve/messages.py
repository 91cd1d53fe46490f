"""What the server and its engine's process say to each other: JSON after its length, over a socket. No pickle."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

from llmkit.core.readable import readable
from llmkit.inference.request import Event, Request, Token
from llmkit.inference.sampling import Sampling

LENGTH = struct.Struct(">I")
DEFAULT = Sampling()
USUAL = tuple((item.name, item.default) for item in dataclasses.fields(Event))
"""What most events hold: made once, as both are looked at with each that passes."""


def packed(message: Any) -> bytes:
    """A message as it is sent."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return LENGTH.pack(len(body)) + body


class Link:
    """The engine's end of the socket."""

    def __init__(self, own: socket.socket) -> None:
        self.own, self.held, self.open = own, bytearray(), True

    def send(self, message: Any) -> None:
        """Sends a message; one that nobody reads any longer is lost."""
        try:
            self.own.sendall(packed(message))
        except OSError:
            self.open = False

    def first(self, wait: float) -> Any:
        """The first message; none where the other end closes, or nothing comes in time."""
        end = time.monotonic() + wait
        while self.open and (left := end - time.monotonic()) > 0:
            for message in self.read(left):
                return message
        return None

    def read(self, wait: float) -> Iterator[Any]:
        """What has come, after at most `wait` seconds."""
        if not readable(self.own, wait):
            return
        more = self.own.recv(1 << 20)
        self.open = self.open and bool(more)
        self.held += more
        while len(self.held) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self.held)[0]
            if len(self.held) < end:
                return
            message = json.loads(bytes(self.held[LENGTH.size : end]))
            del self.held[:end]
            yield message


async def receive(reader: asyncio.StreamReader) -> Any:
    """The next message, at the server's end.

    Raises:
        asyncio.IncompleteReadError: the other end is gone.
    """
    (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return json.loads(await reader.readexactly(size))


def request_out(request: Request) -> dict[str, Any]:
    """A request; its deadline goes as what is left of it."""
    left = None if request.deadline is None else request.deadline - time.monotonic()
    sampling = {
        item.name: _plain(value)
        for item in dataclasses.fields(Sampling)
        if (value := getattr(request.sampling, item.name)) != getattr(DEFAULT, item.name)
    }
    foretold = {"prediction": request.prediction} if request.prediction else {}
    return foretold | {
        "id": request.id,
        "prompt": request.prompt,
        "sampling": sampling,
        "adapter": request.adapter,
        "tenant": request.tenant,
        "priority": request.priority,
        "deadline": left,
    }


def request_in(said: dict[str, Any]) -> Request:
    """The other way."""
    left = said.pop("deadline")
    deadline = None if left is None else time.monotonic() + left
    sampling = Sampling(**said.pop("sampling"))
    prompt, prediction = tuple(said.pop("prompt")), tuple(said.pop("prediction", ()))
    return Request(prompt=prompt, sampling=sampling, deadline=deadline, prediction=prediction, **said)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def event_out(event: Event) -> dict[str, Any]:
    """An event: what of it is not as it is in most."""
    made = {name: value for name, usual in USUAL if (value := getattr(event, name)) != usual}
    made["tokens"] = [_token(token) for token in event.tokens]
    if event.prompt is not None:
        made["prompt"] = [None if token is None else _token(token) for token in event.prompt]
    return made


def event_in(said: dict[str, Any]) -> Event:
    """The other way."""
    said["tokens"] = tuple(map(_as_token, said["tokens"]))
    if "prompt" in said:
        said["prompt"] = tuple(None if token is None else _as_token(token) for token in said["prompt"])
    return Event(**said)


def _token(token: Token) -> list[Any]:
    if token.logprob is None and not token.top:
        return [token.id, token.sampling_logprob]
    return [token.id, token.sampling_logprob, token.logprob, dict(token.top)]


def _as_token(said: list[Any]) -> Token:
    if len(said) == 2:
        return Token(said[0], None, said[1])
    id, sampling, logprob, top = said
    return Token(id, logprob, sampling, {int(key): value for key, value in top.items()})
