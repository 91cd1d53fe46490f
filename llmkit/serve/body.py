"""A request's body: read up to a bound, in bounded time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from llmkit.serve.fields import Fields
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import Refusal
from llmkit.serve.strict import read_json

ASIDE = 64 << 10
"""Bytes of a body that is read beside the loop: a large one takes a while, in which others are answered."""


async def read_fields(request: Request, bounds: Bounds) -> Fields:
    """The fields of a JSON body.

    Raises:
        Refusal: it is none, or too much, or too slow.
    """
    _check_kind(request)
    try:
        async with asyncio.timeout(bounds.receive):
            body = await _read(request, bounds.body)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {bounds.receive:g} s", code="timeout") from None
    except ClientDisconnect:
        raise Refusal(400, "the body ends early", code="invalid_body") from None
    return Fields(await asyncio.to_thread(read_json, body) if len(body) > ASIDE else read_json(body))


def _check_kind(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form of another site, sent by a browser, cannot say this
        what = "content-type is not application/json; fix: send -H 'content-type: application/json'"
        raise Refusal(400, what, key="content-type", code="invalid_header")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(400, "compressed bodies are not taken", key="content-encoding", code="invalid_header")


async def _read(request: Request, most: int) -> bytes:
    said = request.headers.get("content-length", "0")
    if said.isdigit() and int(said) > most:
        raise _too_large(most)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise _too_large(most)
    return bytes(body)


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body is larger than {most} bytes", code="body_too_large")
