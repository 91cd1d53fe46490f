"""Very many clients of one server: what each asks follows from its number, and all that comes is kept account of."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.conftest import WORDS as SAID

WORDS = " ".join(SAID).split()
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closed without a word, as a client that dies."""


@dataclass(frozen=True)
class Ask:
    """One request."""

    path: str
    body: Mapping[str, Any]
    answers: int
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> bytes:
        """As it is sent."""
        data = json.dumps(self.body).encode()
        head = {
            "host": "localhost",
            "content-type": "application/json",
            "content-length": len(data),
            "connection": "close",
        }
        lines = [f"{name}: {value}" for name, value in (head | dict(self.headers)).items()]
        return "\r\n".join([f"POST {self.path} HTTP/1.1", *lines, "", ""]).encode() + data


@dataclass
class Came:
    """What came of it."""

    status: int = 0
    seconds: float = 0.0
    """Until the head of the answer."""
    wait: int = 0
    """Retry-After."""
    ids: set[str] = field(default_factory=set)
    finishes: dict[int, str] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    error: str = ""
    whole: bool = False
    """Whether it came to its end."""
    left: bool = False
    """Whether the client did not wait for it."""
    times: list[float] = field(default_factory=list)
    """When text came, since it was asked for."""


def asks(number: int, keys: tuple[str, ...] = (), longest: int = 12) -> Ask:
    """Of every kind: streamed and whole, chat and completions, one answer and several, of short prompts and long."""
    rng = random.Random(number)
    text = " ".join(rng.choices(WORDS, k=rng.choice((3, 10, 40))))
    n = rng.choice((1, 1, 1, 2, 3))
    body: dict[str, Any] = {"model": "tiny", "max_tokens": rng.randint(1, longest), "ignore_eos": True, "n": n}
    body |= {"seed": number, "stream": rng.random() < 0.5}
    headers = {"authorization": f"Bearer {keys[number % len(keys)]}"} if keys else {}
    if rng.random() < 0.5:
        return Ask("/v1/completions", body | {"prompt": text}, n, headers)
    return Ask("/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}, n, headers)


async def ask(url: str, one: Ask, leave: Callable[[Came], float | None] = lambda _: None) -> Came:
    """Sends it and reads what comes. `leave`: in how many seconds from now the client goes away unless more comes,
    asked after each part; none where it stays."""
    loop, parts = asyncio.get_running_loop(), urlsplit(url)
    came, began = Came(), loop.time()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 22)
    try:
        writer.write(one.bytes)
        async with contextlib.aclosing(_answer(reader, came, lambda: loop.time() - began)) as said:
            while True:
                async with asyncio.timeout(leave(came)):
                    if not await anext(said, False):
                        break
    except TimeoutError:
        came.left = True
        own: socket.socket = writer.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    except (asyncio.IncompleteReadError, ConnectionError) as cause:
        came.error = came.error or type(cause).__name__
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return came


async def read_answer(held: bytes, came: Came) -> None:
    """The same of all the bytes of an answer, or of as many as came."""
    reader = asyncio.StreamReader(limit=1 << 22)
    reader.feed_data(held)
    reader.feed_eof()
    with contextlib.suppress(asyncio.IncompleteReadError):
        async for _ in _answer(reader, came, lambda: 0.0):
            pass


async def _answer(reader: asyncio.StreamReader, came: Came, clock: Callable[[], float]) -> AsyncGenerator[bool]:
    """True for each part that came; what it holds is in `came`."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    came.status, came.seconds = int(head.split()[1]), clock()
    fields = dict(line.split(": ", 1) for line in head.strip().split("\r\n")[1:])
    came.wait = int(fields.get("retry-after", 0))
    if "transfer-encoding" not in fields:
        said = json.loads(await reader.readexactly(int(fields["content-length"])))
        _take(came, said, clock)
        came.whole = not came.error
        yield True
        return
    yield True
    async for line in _lines(reader):
        if line == b"[DONE]":
            came.whole = not came.error
        else:
            _take(came, json.loads(line), clock)
        yield True


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of events; each is sent as a chunk."""
    while size := int(await reader.readline(), 16):
        data = await reader.readexactly(size + 2)
        for line in data.strip().split(b"\n"):
            if line.startswith(b"data: "):
                yield line[6:]


def _take(came: Came, said: Mapping[str, Any], clock: Callable[[], float]) -> None:
    if "error" in said:
        came.error = said["error"]["code"] or said["error"]["message"]
        return
    came.ids.add(said["id"])
    for choice in said["choices"]:
        index, told = choice["index"], choice.get("delta") or choice.get("message") or choice
        text = told.get("content") or told.get("text") or ""
        came.texts[index] = came.texts.get(index, "") + text
        if text:
            came.times.append(clock())
        if choice["finish_reason"]:
            if index in came.finishes:
                came.error = f"answer {index} ended twice"
            came.finishes[index] = choice["finish_reason"]


@dataclass
class Told:
    """What became of many requests."""

    done: dict[int, Came] = field(default_factory=dict)
    refused: list[Came] = field(default_factory=list)

    async def until_done(self, url: str, number: int, one: Ask, pause: float | None = None) -> Came:
        """Asks until it is taken on; `pause`: between two tries, in place of what the server says."""
        while (came := await ask(url, one)).status == 429:
            self.refused.append(came)
            await asyncio.sleep(came.wait if pause is None else pause)
        self.done[number] = came
        return came


async def crowd(work: Iterable[Any], lanes: int) -> None:
    """Awaits what `work` gives, so many at a time."""
    left = iter(work)

    async def lane() -> None:
        for one in left:
            await one

    async with asyncio.TaskGroup() as group:
        for _ in range(lanes):
            group.create_task(lane())
