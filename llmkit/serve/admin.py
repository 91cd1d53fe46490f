"""Routes for whoever runs the server, on a listener and behind keys of their own; none of them is on the other one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmkit.serve import reply
from llmkit.serve.body import read_fields
from llmkit.serve.faults import HANDLERS
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.kinds import parse
from llmkit.serve.metrics import TYPE, Metrics
from llmkit.serve.openapi import document
from llmkit.serve.service import Service
from llmkit.serve.shapes import LOAD_IGNORED, UNLOAD_IGNORED, LoadAdapter, NewWeights, UnloadAdapter

Work = Callable[[Fields], Awaitable[Any]]


class Admin:
    """What can be changed while a server runs."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics

    def asgi(self) -> Starlette:
        """What the listener of its own runs."""
        post: dict[str, Work] = {
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
            "/admin/pause": self.pause,
            "/admin/resume": self.resume,
            "/admin/reset_prefix_cache": self.reset,
            "/admin/weights": self.weights,
        }
        routes = [Route(path, self._asked(work), methods=["POST"]) for path, work in post.items()]
        get = {"/metrics": self.numbers, "/health": self.health, "/openapi.json": self.document}
        routes += [Route(path, answer, methods=["GET"]) for path, answer in get.items()]
        app = Starlette(routes=routes, exception_handlers=HANDLERS)
        app.router.redirect_slashes = False
        return app

    def _asked(self, work: Work) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            done = await work(await read_fields(request, self.service.bounds))
            return reply.whole({"status": "ok", "value": done})

        return answer

    async def load(self, fields: Fields) -> Any:
        """An adapter of a folder under the root is served under a name, to all or to one tenant."""
        said = parse(LoadAdapter, fields, self.service.bounds)
        fields.end(LOAD_IGNORED)
        name, path = said.lora_name, said.lora_path
        for key, given in (("lora_name", name), ("lora_path", path)):
            if not given:
                raise wrong(key, "is missing")
        if name == self.service.name:
            raise wrong("lora_name", f"{name[:80]!r} is the model's own name")
        made = await self.service.engine.call("load", name=name, path=path)
        self.service.adapters[name] = said.tenant
        self.service.engine.settings["loaded"][name] = path  # for an engine that is started again
        return made

    async def unload(self, fields: Fields) -> Any:
        """No request gets it from now on; those that run end on it."""
        name = parse(UnloadAdapter, fields, self.service.bounds).lora_name
        fields.end(UNLOAD_IGNORED)
        if name not in self.service.adapters:
            raise wrong("lora_name", f"no adapter is named {name[:80]!r}")
        made = await self.service.engine.call("unload", name=name)
        self.service.adapters.pop(name, None)
        for known in ("loaded", "adapters"):  # an engine that is started again reads it no more
            self.service.engine.settings.get(known, {}).pop(name, None)
        return made

    async def pause(self, fields: Fields) -> Any:
        """No steps are made; requests are taken on and wait."""
        fields.end()
        return await self.service.engine.call("pause", on=True)

    async def resume(self, fields: Fields) -> Any:
        """Steps are made again."""
        fields.end()
        return await self.service.engine.call("pause", on=False)

    async def reset(self, fields: Fields) -> Any:
        """The prefix cache is emptied."""
        fields.end()
        return await self.service.engine.call("reset")

    async def weights(self, fields: Fields) -> Any:
        """Other weights for the model, of a folder under the root; what runs ends on those that it began with."""
        path = parse(NewWeights, fields, self.service.bounds).path
        fields.end()
        if not path:
            raise wrong("path", "is missing")
        made = await self.service.engine.call("weights", path=path)
        self.service.engine.settings["weights"] = path, made  # for an engine that is started again
        return made

    async def numbers(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(), headers={"content-type": TYPE})

    async def document(self, request: Request) -> Response:
        """What these routes take and answer."""
        return reply.whole(document(self.service.bounds, request.scope["caller"].key is not None, admin=True))

    async def health(self, request: Request) -> Response:
        """Whether the engine is there."""
        return reply.whole({"status": "ok" if self.service.engine.ready else "unavailable"})
