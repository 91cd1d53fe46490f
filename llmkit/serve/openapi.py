"""The server's own document of its routes (OpenAPI 3.1), made of the shapes by which requests are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from llmkit.serve import shapes
from llmkit.serve.described import Schema
from llmkit.serve.idempotent import LONGEST
from llmkit.serve.kinds import object_of
from llmkit.serve.node import Bounds
from llmkit.serve.openapi_answers import ANSWERS, ERROR, Answer


@dataclass(frozen=True)
class Body:
    """What is sent to a route."""

    shapes: tuple[type[Any], ...]
    ignored: tuple[str, ...] = ()
    required: tuple[str, ...] = ()

    def schema(self, bounds: Bounds) -> Schema:
        """Its object."""
        return object_of(*self.shapes, bounds=bounds, ignored=self.ignored, required=self.required)


@dataclass(frozen=True)
class Responding(Body):
    """The same for `/v1/responses`, some of whose fields are those of chat."""

    def schema(self, bounds: Bounds) -> Schema:
        """Its object."""
        made, chat = super().schema(bounds), object_of(*CHAT.shapes, bounds=bounds)["properties"]
        held = {**made["properties"], **{name: chat[name] for name in shapes.SAME}}
        return made | {"properties": held}


CHAT = Body((shapes.Common, shapes.Conversation, shapes.Sampled), shapes.IGNORED, ("messages",))
BODIES: Mapping[str, Body] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": Body((shapes.Common, shapes.Prompted, shapes.Sampled), shapes.IGNORED, ("prompt",)),
    "/v1/responses": Responding((shapes.Responding,), shapes.RESPONSES_IGNORED, ("input",)),
    "/v1/embeddings": Body((shapes.Embedding,), shapes.IGNORED, ("input",)),
    "/tokenize": Body((shapes.Tokenizing,)),
    "/detokenize": Body((shapes.Detokenizing,)),
}
ADMIN_BODIES: Mapping[str, Body] = {
    "/v1/load_lora_adapter": Body((shapes.LoadAdapter,), shapes.LOAD_IGNORED, ("lora_name", "lora_path")),
    "/v1/unload_lora_adapter": Body((shapes.UnloadAdapter,), shapes.UNLOAD_IGNORED, ("lora_name",)),
    "/admin/weights": Body((shapes.NewWeights,), (), ("path",)),
    "/admin/pause": Body(()),
    "/admin/resume": Body(()),
    "/admin/reset_prefix_cache": Body(()),
}
NAMES = {"/v1/models/{name}": "name", "/v1/responses/{id}": "id"}
"""Paths with a part that varies."""
GETS = ("/health", "/metrics", "/v1/models", *NAMES, "/openapi.json")
ADMIN_GETS = ("/health", "/metrics", "/openapi.json")
REFUSALS = {
    "400": "a field, a header or the body cannot be used; `param` names the field",
    "401": "no valid key",
    "403": "without keys: the request was sent to another name than this machine's, or by a page of another site",
    "404": "there is none of that name",
    "408": "the body, or the answer, did not come in time",
    "409": "the idempotency key was used for another request",
    "413": "the body is too large",
    "429": "there is no room; `Retry-After` says when to come back",
    "431": "the path and the headers are too large together",
    "500": "a fault of the server's own; its log has it under the name of the request",
    "503": "the server is being started or stopped, or its engine died; `Retry-After` says when to come back",
}
NAME: Schema = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "the name of the request in logs; another is made of one that does not fit",
    "schema": {"type": "string"},
}
ONCE: Schema = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "the request is carried out once; its answer is told again to whoever asks with the same key",
    "schema": {"type": "string", "maxLength": LONGEST},
}


def document(bounds: Bounds, keys: bool, admin: bool = False) -> Schema:
    """What one listener answers; `keys`: whether it asks for them."""
    bodies, gets = (ADMIN_BODIES, ADMIN_GETS) if admin else (BODIES, GETS)
    paths: dict[str, Schema] = {path: {"get": _get(path)} for path in gets}
    for path, body in bodies.items():
        paths.setdefault(path, {})["post"] = _post(path, body.schema(bounds), [NAME] if admin else [ONCE, NAME])
    made: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "llmkit, admin" if admin else "llmkit", "version": version("llmkit")},
        "paths": paths,
        "components": {"schemas": {"Error": ERROR}},
    }
    if keys:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
        paths["/health"]["get"]["security"] = []
    return made


def _get(path: str) -> Schema:
    made: Schema = {"responses": _answers(ANSWERS[path], ("401", "403", "404", "500", "503"))}
    if path in NAMES:
        made["parameters"] = [{"name": NAMES[path], "in": "path", "required": True, "schema": {"type": "string"}}]
    return made


def _post(path: str, schema: Schema, headers: list[Schema]) -> Schema:
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"requestBody": body, "parameters": headers, "responses": _answers(ANSWERS[path], tuple(REFUSALS))}


def _answers(good: Answer | None, refusals: tuple[str, ...]) -> Schema:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    made: Schema = {status: {"description": REFUSALS[status], "content": error} for status in refusals}
    if good is not None:
        made["200"] = {"description": good.what, "content": good.content}
    return made
