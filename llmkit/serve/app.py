"""The routes that everybody may ask for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmkit.serve import chat, completions, page, reply, responses, texts
from llmkit.serve.body import read_fields
from llmkit.serve.caller import Caller
from llmkit.serve.chat_told import ChatWriter
from llmkit.serve.completions import TextWriter
from llmkit.serve.faults import HANDLERS
from llmkit.serve.fields import Fields
from llmkit.serve.metrics import TYPE, Metrics
from llmkit.serve.openapi import document
from llmkit.serve.refusal import Refusal
from llmkit.serve.responses_told import ResponseWriter
from llmkit.serve.service import Service

Asked = Callable[[Fields, Caller], Coroutine[Any, Any, Response]]
Told = Callable[[Service, Fields, Caller], Coroutine[Any, Any, dict[str, Any]]]


class Writer(Protocol):
    """What answers, whole or in parts."""

    async def whole(self) -> dict[str, Any]:
        """All of it."""
        ...

    def parts(self) -> AsyncGenerator[dict[str, Any], None]:
        """As it is made."""
        ...


class App:
    """The service over HTTP."""

    def __init__(self, service: Service, metrics: Metrics, playground: bool = True) -> None:
        self.service, self.metrics = service, metrics
        self.pages = tuple(page.PATHS) if playground else ()

    def asgi(self) -> Starlette:
        """What a server runs."""
        get = {
            "/health": self.health,
            "/metrics": self.numbers,
            "/openapi.json": self.document,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/v1/responses/{id}": self.response,
            **dict.fromkeys(self.pages, self.page),
        }
        post = {
            "/v1/chat/completions": self.asked(self.chat),
            "/v1/completions": self.asked(self.completions),
            "/v1/responses": self.asked(self.responses),
            "/v1/embeddings": self.told(texts.embeddings),
            "/tokenize": self.told(texts.tokenize),
            "/detokenize": self.told(texts.detokenize),
        }
        routes = [Route(path, work, methods=["POST"]) for path, work in post.items()]  # looked through in this order
        routes += [Route(path, work, methods=["GET"]) for path, work in get.items()]
        app = Starlette(routes=routes, exception_handlers=HANDLERS)
        app.router.redirect_slashes = False
        return app

    def asked(self, work: Asked) -> Callable[[Request], Awaitable[Response]]:
        """A route whose body is an object of fields, and whose work is given up when the client leaves."""

        async def answer(request: Request) -> Response:
            caller = request.scope["caller"]
            self.service.gate.check(caller)  # what came by a key of its own was not looked at yet
            fields = await read_fields(request, self.service.bounds)
            return await reply.while_there(request, work(fields, caller))

        return answer

    def told(self, work: Told) -> Callable[[Request], Awaitable[Response]]:
        """The same where the answer is one object."""

        async def answer(fields: Fields, caller: Caller) -> Response:
            return reply.whole(await work(self.service, fields, caller))

        return self.asked(answer)

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        ready = self.service.engine.ready and not self.service.draining
        return reply.whole({"status": "ok" if ready else "unavailable"}, 200 if ready else 503)

    async def numbers(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(), headers={"content-type": TYPE})

    async def document(self, request: Request) -> Response:
        """What the routes take and answer."""
        return reply.whole(document(self.service.bounds, request.scope["caller"].key is not None))

    async def page(self, request: Request) -> Response:
        """The playground."""
        body, kind = page.page(request.url.path) or (b"", "text/plain")
        return Response(body, headers={**page.HEADERS, "content-type": kind})

    async def models(self, request: Request) -> Response:
        """What can be named as `model`."""
        names = self.service.models(request.scope["caller"])
        return reply.whole({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        self.service.adapter(name, request.scope["caller"])
        return reply.whole(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        service = self.service
        made = {"id": name, "object": "model", "created": int(service.began), "owned_by": "llmkit"}
        parent = None if name == service.name else service.name
        longest = service.longest if service.engine.facts else None  # a model that is being loaded is listed too
        return made | {"root": service.name, "parent": parent, "max_model_len": longest}

    async def response(self, request: Request) -> Response:
        """Nothing is stored: there is none of anybody's."""
        raise Refusal(404, "responses are not stored", key="id", code="not_found")

    async def chat(self, fields: Fields, caller: Caller) -> Response:
        """`/v1/chat/completions`."""
        asked = await chat.read(self.service, fields, caller)
        return await written(ChatWriter(self.service, asked), asked.stream)

    async def completions(self, fields: Fields, caller: Caller) -> Response:
        """`/v1/completions`."""
        asked = await completions.read(self.service, fields, caller)
        return await written(TextWriter(self.service, asked), asked.stream)

    async def responses(self, fields: Fields, caller: Caller) -> Response:
        """`/v1/responses`."""
        asked = await responses.read(self.service, fields, caller)
        return await written(ResponseWriter(self.service, asked), asked.chat.stream, named=True)


async def written(writer: Writer, stream: bool, named: bool = False) -> Response:
    """An answer as its client wants it."""
    return await reply.streamed(writer.parts(), named) if stream else reply.whole(await writer.whole())
