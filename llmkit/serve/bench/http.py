"""A client that does no more than is measured: one connection a request, events as they come."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from llmkit.core.errors import RecipeError
from llmkit.serve.bench.load import Asked

MOST = 1 << 20
"""Bytes of a line, and of an error."""


class Failed(Exception):
    """An answer that is none; `status` is 0 where there was no answer at all."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(f"{status}: {what}" if status else what)
        self.status = status


class Endpoint:
    """A server by the address of its OpenAI routes."""

    def __init__(self, url: str, key: str = "") -> None:
        """Raises:
        RecipeError: it is no address.
        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(f"{url[:200]} is no address", fix="give one such as http://127.0.0.1:8000", key="URL")
        self.host, self.secure = parts.hostname, parts.scheme == "https"
        self.port = port or (443 if self.secure else 80)
        base = parts.path.rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"
        self.key = key
        self.shown = f"{parts.scheme}://{self.host}:{self.port}{self.base}"
        """Without what a login may hold."""

    async def send(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed answer.

        Raises:
            Failed: the server refuses, answers what is no stream, or breaks off.
        """
        context = ssl.create_default_context() if self.secure else None
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=context, limit=MOST)
        try:
            body = json.dumps(asked.body).encode()
            writer.write(self._head(asked.path, len(body)) + body)
            await writer.drain()
            status, headers = await _answered(reader)
            pieces = _body(reader, headers)
            if status != 200:
                raise Failed(status, await _why(pieces))
            async for event in _events(pieces):
                yield event
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _head(self, path: str, length: int) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"POST {self.base}{path} HTTP/1.1",
            f"host: {host}:{self.port}",
            "user-agent: llmkit-bench",
            "content-type: application/json",
            f"content-length: {length}",
            "accept: text/event-stream",
            "connection: close",
        ]
        if self.key:
            lines.append(f"authorization: Bearer {self.key}")
        return "\r\n".join([*lines, "", ""]).encode()


async def _answered(reader: asyncio.StreamReader) -> tuple[int, Mapping[str, str]]:
    first = (await reader.readline()).decode("latin-1").split(" ", 2)
    if len(first) < 2 or not first[0].startswith("HTTP/") or not first[1].isdigit():
        raise Failed(0, "no HTTP answer came")
    headers: dict[str, str] = {}
    while line := (await reader.readline()).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(first[1]), headers


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        return
    left = int(headers.get("content-length", 1 << 62))
    while left > 0 and (piece := await reader.read(min(left, 1 << 16))):
        left -= len(piece)
        yield piece


async def _why(pieces: AsyncIterator[bytes]) -> str:
    held = b""
    async for piece in pieces:
        held += piece
        if len(held) > MOST:
            break
    try:
        return str(json.loads(held)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError, RecursionError):
        return held[:200].decode("utf-8", "replace") or "nothing more"


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The data of server-sent events, each of one line, up to the mark of the end."""
    held = b""
    async for piece in pieces:
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if line.startswith(b"data:") and data:
                event = json.loads(data)
                if isinstance(event, dict) and event.get("error"):
                    raise Failed(200, _message(event["error"]))
                yield event
        if len(held) > MOST:
            raise Failed(200, "a line has no end")
    raise Failed(200, "the stream broke off")


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
