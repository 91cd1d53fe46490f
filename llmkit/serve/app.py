"""The routes, and what is around all of them."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmkit.serve import chat, completions, reply
from llmkit.serve.body import read_fields
from llmkit.serve.fields import Fields
from llmkit.serve.refusal import Refusal
from llmkit.serve.service import Caller, Service

Asked = Callable[[Fields, Caller], Awaitable[Response]]


class App:
    """The service over HTTP."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def asgi(self) -> Starlette:
        """What a server runs."""
        routes = [
            Route("/health", self.health, methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/v1/chat/completions", self.asked(self.chat), methods=["POST"]),
            Route("/v1/completions", self.asked(self.completions), methods=["POST"]),
        ]
        handlers: Any = {Refusal: _refused, HTTPException: _no_route, Exception: _fault}
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app

    def asked(self, work: Asked) -> Callable[[Request], Awaitable[Response]]:
        """A route whose body is an object of fields, and whose work is given up when the client leaves."""

        async def answer(request: Request) -> Response:
            fields = await read_fields(request, self.service.bounds)
            caller: Caller = request.scope.get("caller") or Caller(id=secrets.token_hex(12))
            return await reply.while_there(request, lambda: work(fields, caller))

        return answer

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        ready = self.service.engine.ready
        return reply.whole({"status": "ok" if ready else "starting"}, 200 if ready else 503)

    async def models(self, request: Request) -> Response:
        """What can be named as `model`."""
        caller: Caller = request.scope.get("caller") or Caller()
        found = [name for name, owner in self.service.adapters.items() if owner in ("", caller.tenant)]
        return reply.whole({"object": "list", "data": [self._model(name) for name in (self.service.name, *found)]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        self.service.adapter(name, request.scope.get("caller") or Caller())
        return reply.whole(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        known = self.service.engine.facts
        made = {"id": name, "object": "model", "created": self.service.began, "owned_by": "llmkit"}
        return made | {"root": self.service.name, "parent": None, "max_model_len": known.get("longest")}

    async def chat(self, fields: Fields, caller: Caller) -> Response:
        """`/v1/chat/completions`."""
        asked = await chat.read(self.service, fields, caller)
        writer = chat.Writer(self.service, asked)
        return await reply.streamed(writer.parts()) if asked.stream else reply.whole(await writer.whole())

    async def completions(self, fields: Fields, caller: Caller) -> Response:
        """`/v1/completions`."""
        asked = await completions.read(self.service, fields, caller)
        writer = completions.Writer(self.service, asked)
        return await reply.streamed(writer.parts()) if asked.stream else reply.whole(await writer.whole())


async def _refused(request: Request, cause: Exception) -> Response:
    if isinstance(cause, Refusal):
        return reply.error(cause)
    raise cause


async def _no_route(request: Request, cause: Exception) -> Response:
    status = getattr(cause, "status_code", 404)
    what = {404: f"there is no {request.url.path[:200]}", 405: f"{request.method} is not answered here"}
    return reply.error(Refusal(status, what.get(status, "the request cannot be answered"), code="not_found"))


async def _fault(request: Request, cause: Exception) -> Response:
    return reply.error(reply.fault(cause))
