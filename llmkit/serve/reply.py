"""How an answer goes out: whole, or as a stream of events; whoever asked may leave at any time."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmkit.inference.request import traced
from llmkit.serve.refusal import Fault, Refusal

LOG = logging.getLogger("llmkit.serve")
T = TypeVar("T")
Stream = AsyncGenerator[dict[str, Any], None]
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"


def whole(value: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(as_json(value), status, media_type="application/json")


def as_json(value: Any) -> bytes:
    """In as few letters as there are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def error(refusal: Refusal) -> Response:
    """An answer that is an error."""
    return Response(refusal.body, refusal.status, dict(refusal.headers), media_type="application/json")


async def streamed(events: Stream, named: bool = False) -> Response:
    """An answer as server-sent events; `named` ones carry their `type` as a name.

    Its status is told with the first event, so that what is refused is an error with a status of its own.

    Raises:
        Refusal: it was refused before anything came.
    """
    try:
        begun = await anext(events)
    except BaseException:
        await events.aclose()
        raise
    return Events(begun, events, named)


class Events(Response):
    """Server-sent events, given up when the client leaves."""

    def __init__(self, begun: dict[str, Any], events: Stream, named: bool) -> None:
        super().__init__(headers=HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self.begun, self.events, self.named = begun, events, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """All of them, and then the end; or as many as the client waits for."""
        async with as_long_as_there(self._send(scope, send), receive) as sent:
            if sent.done():
                sent.result()

    async def _send(self, scope: Scope, send: Send) -> None:
        async with aclosing(self.events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self._lines(scope):
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _lines(self, scope: Scope) -> AsyncIterator[bytes]:
        """What fails in the middle is told as the last event, and then the stream ends without its end mark. Its status
        was told long ago: who counts failures finds it in the scope."""
        more = {"type": "error"} if self.named else {}
        try:
            yield _line(self.begun, self.named)
            async for event in self.events:
                yield _line(event, self.named)
        except Refusal as cause:
            yield _line(noted(scope, cause).error | more, self.named)
            return
        except Exception as cause:
            yield _line(noted(scope, cause).error | more, self.named)
            raise
        if not self.named:
            yield DONE


def _line(event: dict[str, Any], named: bool) -> bytes:
    name = f"event: {event['type']}\n".encode() if named else b""
    return name + b"data: " + as_json(event) + b"\n\n"


def noted(scope: Scope, cause: Exception) -> Refusal:
    """What a client is told of it, whose code is in the scope for those who count. Of what nobody foresaw it is told
    nothing but the request's name, under which all of it is in the log."""
    told = cause if isinstance(cause, Refusal) else None
    if told is None or isinstance(told, Fault):
        name = scope["caller"].id
        trace = told.trace if told is not None else traced(cause)
        LOG.error("a fault of the server's own", extra={"request_id": name, "trace": trace})
        what = f"the server met a fault of its own, which its log has under {name}"
        told = Refusal(500, what, code="internal_error")
    scope["refused"] = told.code or str(told.status)
    return told


async def while_there(request: Request, work: Awaitable[Response]) -> Response:
    """What `work` gives, as long as the client waits for it: when it leaves, the work is given up.

    Raises:
        Refusal: what the work raises; 499, the client left.
    """
    async with as_long_as_there(work, request.receive) as done:
        if done.done():
            return done.result()
        raise Refusal(499, "the client left", code="client_closed")


@asynccontextmanager
async def as_long_as_there(work: Awaitable[T], receive: Receive) -> AsyncIterator[asyncio.Future[T]]:
    """`work`, once it is done or the client has left; if it is not done, it is given up after that."""
    done, left = asyncio.ensure_future(work), asyncio.ensure_future(_until_left(receive))
    try:
        await asyncio.wait((done, left), return_when=asyncio.FIRST_COMPLETED)
        yield done
    finally:
        done.cancel()
        left.cancel()
        await asyncio.gather(done, left, return_exceptions=True)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
