"""How an answer goes out: whole, or as a stream of events; whoever asked may leave at any time."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from llmkit.serve.refusal import Refusal

LOG = logging.getLogger("llmkit.serve")
Stream = AsyncIterator[dict[str, Any]]
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"


def whole(value: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(as_json(value), status, media_type="application/json")


def as_json(value: Any) -> bytes:
    """In as few letters as there are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def error(refusal: Refusal) -> Response:
    """An answer that is an error."""
    return Response(refusal.body, refusal.status, dict(refusal.headers), media_type="application/json")


async def streamed(events: Stream, named: bool = False) -> Response:
    """An answer as server-sent events; `named` ones carry their `type` as a name.

    Its status is told with the first event, so that what is refused is an error with a status of its own.

    Raises:
        Refusal: it was refused before anything came.
    """
    begun = await anext(events)
    return StreamingResponse(_lines(begun, events, named), media_type="text/event-stream", headers=HEADERS)


async def _lines(begun: dict[str, Any], events: Stream, named: bool) -> AsyncIterator[bytes]:
    """What fails in the middle is told as the last event, and then the stream ends without its end mark."""
    try:
        yield _line(begun, named)
        async for event in events:
            yield _line(event, named)
    except Refusal as cause:
        yield _line(cause.error | ({"type": "error"} if named else {}), named)
        return
    except Exception as cause:
        yield _line(fault(cause).error | ({"type": "error"} if named else {}), named)
        raise
    if not named:
        yield DONE


def _line(event: dict[str, Any], named: bool) -> bytes:
    name = f"event: {event['type']}\n".encode() if named else b""
    return name + b"data: " + as_json(event) + b"\n\n"


def fault(cause: BaseException) -> Refusal:
    """What nobody foresaw: a client is told no more than that."""
    return Refusal(500, f"the server met a fault of its own ({type(cause).__name__})", code="internal_error")


async def while_there(request: Request, work: Callable[[], Awaitable[Response]]) -> Response:
    """What `work` gives, as long as the client waits for it: when it leaves, the work is given up."""
    done, left = asyncio.ensure_future(work()), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((done, left), return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        raise Refusal(499, "the client left", code="client_closed")
    finally:
        for task in (done, left):
            task.cancel()
        await asyncio.gather(done, left, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
