"""A server of the OpenAI routes that says what the question asks it to say, piece by piece, as the test lets it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmkit.serve.page import HEADERS, page

MODELS = [{"id": "small", "parent": None}, {"id": "large", "parent": None}, {"id": "poet", "parent": "small"}]
ATTACK = """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"""
WORDS = {"likely": 0.97, " so": 0.6, " rare": 0.1, "\n<never>": 0.001}


@contextlib.contextmanager
def running(app: Starlette) -> Iterator[str]:
    """The address of an app that is served, in a thread."""
    own = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{own.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


class Scripted:
    """What the server does; `asked` holds what came."""

    url = ""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.go = threading.Event()
        self.left = threading.Event()
        paths = [Route("/v1/models", self.models), Route("/v1/chat/completions", self.chat, methods=["POST"])]
        app = Starlette(routes=[*paths, Route("/{path:path}", self.file)])
        self.app = app

    async def file(self, request: Request) -> Response:
        found = page(request.url.path)
        if found is None:
            return Response("", 404)
        return Response(found[0], headers={**HEADERS, "content-type": found[1]})

    async def models(self, request: Request) -> Response:
        self.keys.append(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": MODELS})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.keys.append(request.headers.get("authorization"))
        if body["messages"][-1]["content"] == "refuse":
            return JSONResponse({"error": {"message": "no <b>room</b>", "type": "overloaded"}}, 429)
        return StreamingResponse(self._lines(body), media_type="text/event-stream")

    async def _lines(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        try:
            async for part in self._parts(body):
                yield b"data: " + json.dumps(part).encode() + b"\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise
        if body["messages"][-1]["content"] != "break":
            yield b"data: [DONE]\n\n"

    async def _parts(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        said = body["messages"][-1]["content"]
        yield chunk({"role": "assistant", "content": ""})
        if said == "wait":
            yield chunk({"content": "first "})
            while not self.go.is_set():
                await asyncio.sleep(0.01)
            yield chunk({"content": "second"})
        elif said == "think":
            yield chunk({"reasoning_content": "<i>hm</i>"})
            yield chunk({"content": "yes"})
        elif said == "attack":
            for at in range(0, len(ATTACK), 7):
                yield chunk({"content": ATTACK[at : at + 7]})
        elif said == "fail":
            yield chunk({"content": "half"})
            yield {"error": {"message": "the engine <u>stopped</u>", "type": "server_error"}}
        elif said != "break":
            for word, p in WORDS.items():
                yield chunk({"content": word}, likely(word, p) if body.get("logprobs") else None)
            yield chunk({"content": f" by {body['model']}"})
        yield chunk({}, None, "stop") | {
            "usage": {"completion_tokens": 4, "completion_tokens_details": {"accepted_prediction_tokens": 2}}
        }


def chunk(delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]}


def likely(word: str, p: float) -> dict[str, Any]:
    other = {"token": "<other>", "logprob": math.log(0.3)}
    own = {"token": word, "logprob": math.log(p)}
    return {"content": [own | {"top_logprobs": [own, other]}]}
