"""Requests with an `Idempotency-Key`: carried out once, and told again to whoever asks with the same key.

What was answered is kept in memory, for a while: a second copy of the server does not know it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.serve import reply
from llmkit.serve.caller import Caller
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import Refusal

LASTS = 600.0
"""Seconds for which an answer is told again."""
MOST = 1024
"""Answers that are kept."""
ROOM = 64 << 20
"""Bytes of them all."""
LONGEST = 255
"""Letters of a key."""


@dataclass
class Kept:
    """One answer, as it is being made or was."""

    digest: bytes
    """Of the route and the body."""
    messages: list[Message] = field(default_factory=list)
    size: int = 0
    done: bool = False
    at: float = field(default_factory=time.monotonic)
    more: asyncio.Condition = field(default_factory=asyncio.Condition)
    task: asyncio.Task[None] | None = None

    async def add(self, message: Message) -> None:
        """The next part of it."""
        self.messages.append(dict(message))
        self.size += len(message.get("body", b""))
        await self._wake()

    async def end(self) -> None:
        """All of it is there; who asks from now on gets its body in one part, which takes far less than many."""
        self.done = True
        await self._wake()
        if len(self.messages) > 2:
            whole = b"".join(message.get("body", b"") for message in self.messages)
            self.messages = [self.messages[0], {"type": "http.response.body", "body": whole}]

    async def _wake(self) -> None:
        async with self.more:
            self.more.notify_all()

    def _beyond(self, at: int) -> bool:
        return at < len(self.messages) or self.done

    async def tell(self, send: Send) -> None:
        """Sends it, from its beginning, as far as it comes."""
        messages, at = self.messages, 0
        while True:
            async with self.more:
                await self.more.wait_for(partial(self._beyond, at))
            while at < len(messages):
                await send(dict(messages[at]))
                at += 1
            if self.done and at == len(messages):
                return


class Idempotent:
    """Around an application."""

    def __init__(self, app: ASGIApp, bounds: Bounds, clock: Callable[[], float] = time.monotonic) -> None:
        self.app, self.bounds, self.clock = app, bounds, clock
        self.kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        key = key_of(scope)
        if not key or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        caller: Caller = scope["caller"]
        if len(key) > LONGEST:
            what = f"an idempotency key has at most {LONGEST} letters"
            refusal = Refusal(400, what, key="idempotency-key", code="invalid_header")
            await reply.error(refusal)(scope, receive, send)
            return
        body, whole = await _body(receive, self.bounds.body, self.bounds.receive)
        if not whole:  # the route says what is wrong with it
            await self.app(scope, _again(body, receive), send)
            return
        digest = hashlib.sha256(scope["path"].encode() + b"\0" + body).digest()
        self._forget()
        kept = self.kept.get((caller.tenant, key))
        if kept is None:
            kept = self._begin(scope, (caller.tenant, key), body, digest)
        elif kept.digest != digest:
            what = "the idempotency key was used for another request"
            refusal = Refusal(409, what, key="idempotency-key", code="idempotency_key_reused")
            await reply.error(refusal)(scope, receive, send)
            return
        async with reply.as_long_as_there(kept.tell(send), receive):
            pass  # it fails in sending alone: then its client is gone

    def _begin(self, scope: Scope, name: tuple[str, str], body: bytes, digest: bytes) -> Kept:
        """Carried out whether or not its client stays: it may ask again."""
        kept = self.kept[name] = Kept(digest, at=self.clock())

        async def work() -> None:
            try:
                await self.app(scope, _again(body, _never), kept.add)
            finally:
                await kept.end()
                if not kept.messages or kept.messages[0].get("status", 500) >= 400 or "refused" in scope:
                    self.kept.pop(name, None)  # what was refused, or failed in the middle, may be tried again

        kept.task = asyncio.create_task(work())
        kept.task.add_done_callback(_seen)
        return kept

    def _forget(self) -> None:
        """What is old, or too much."""
        now = self.clock()
        size = sum(kept.size for kept in self.kept.values())
        for name, kept in list(self.kept.items()):
            if kept.done and (now - kept.at > LASTS or len(self.kept) > MOST or size > ROOM):
                size -= kept.size
                del self.kept[name]


def _seen(task: asyncio.Task[None]) -> None:
    """A fault was logged by the application, and told to its client: nobody awaits this one to hear of it again."""
    if not task.cancelled():
        task.exception()


def key_of(scope: Scope) -> str:
    """The idempotency key of a request, or nothing."""
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == b"idempotency-key"), "")


async def _body(receive: Receive, most: int, seconds: float) -> tuple[bytes, bool]:
    """A body, and whether it is all of it: no more than a route would take, and a little."""
    held = bytearray()
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while len(held) <= most:
                message = await receive()
                if message["type"] != "http.request":
                    break
                held += message.get("body", b"")
                if not message.get("more_body", False):
                    return bytes(held), True
    return bytes(held), False


def _again(body: bytes, after: Receive) -> Receive:
    """Gives a body that was read already, and then what comes after it."""
    given = [False]

    async def receive() -> Message:
        if given[0]:
            return await after()
        given[0] = True
        return {"type": "http.request", "body": body, "more_body": after is not _never}

    return receive


async def _never() -> Message:
    await asyncio.get_running_loop().create_future()
    return {"type": "http.disconnect"}
