"""The server's own document: what it says of each field is what the routes do."""

from __future__ import annotations

import copy
import re

import httpx
import jsonschema
import pytest
from starlette.routing import Route

from llmkit.serve.admin import Admin
from llmkit.serve.app import App
from llmkit.serve.fields import Fields
from llmkit.serve.node import Bounds
from llmkit.serve.openapi import ADMIN_BODIES, BODIES, document
from tests.serve.conftest import Running
from tests.serve.samples import ADMIN, GOOD, chat, response, text

PLAIN = [
    chat(),
    text(),
    response(),
    ("/v1/embeddings", {"input": "a"}),
    ("/tokenize", {"prompt": "a"}),
    ("/detokenize", {"tokens": [5]}),
]


@pytest.fixture(scope="module")
def server(tooled):
    running = Running(tooled)
    with httpx.Client(base_url=running.url, timeout=60) as client:
        running.client = client
        yield running
    running.stop()


@pytest.fixture(scope="module")
def told(server):
    return server.client.get("/openapi.json").json()


def body_of(told, path):
    return told["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def post(server, path, body):
    said = server.client.post(path, json=body)
    return said.status_code, said.json() if "json" in said.headers["content-type"] else said.text


def test_it_names_the_routes_that_there_are_and_its_schemas_are_sound(server, told):
    for own, routes in (
        (told, App(server.service, None, False).asgi().routes),
        (document(Bounds(), keys=True, admin=True), Admin(server.service, None).asgi().routes),
    ):
        there = {
            (route.path.replace(":path", ""), method)
            for route in routes
            if isinstance(route, Route)
            for method in route.methods - {"HEAD"}
        }
        assert there == {(path, method.upper()) for path, held in own["paths"].items() for method in held}
        for path, held in own["paths"].items():
            for work in held.values():
                jsonschema.Draft202012Validator.check_schema(work["responses"].get("200", {}).get("content", {}))
            if "post" in held:
                jsonschema.Draft202012Validator.check_schema(body_of(own, path))
    assert "security" not in told and document(Bounds(), keys=True)["security"] == [{"key": []}]


@pytest.mark.parametrize("at", range(len(GOOD)))
def test_a_good_request_and_its_answer_are_as_it_says(server, told, at):
    path, body = GOOD[at]
    jsonschema.validate(body, body_of(told, path))
    status, said = post(server, path, body)
    assert status == 200, said
    content = told["paths"][path]["post"]["responses"]["200"]["content"]
    kind = "text/event-stream" if body.get("stream") else "application/json"
    jsonschema.validate(said, content[kind].get("schema", {"type": "string"}))


def test_every_field_that_is_read_is_told_and_the_other_way(server, told, monkeypatch):
    """Each body but for one that is refused has all of its fields asked for: what was asked is what is told."""
    asked, end = {}, Fields.end

    def noted(self, ignored=()):
        asked.setdefault(self.at, set()).update(self.read, ignored)
        end(self, ignored)

    monkeypatch.setattr(Fields, "end", noted)
    for path, body in PLAIN:
        asked.clear()
        assert post(server, path, body)[0] == 200
        extra = {"conversation", "previous_response_id"} if path == "/v1/responses" else set()
        own = asked[""] | extra
        if path == "/v1/responses":  # the conversation that it stands for is read by the same objects
            own -= set(body_of(told, "/v1/chat/completions")["properties"]) - set(body_of(told, path)["properties"])
        assert own == set(body_of(told, path)["properties"]), path
    asked.clear()
    post(server, *chat())
    one = body_of(told, "/v1/chat/completions")["properties"]["messages"]["items"]
    assert asked["messages.0"] == set(one["properties"])


def edges(schema):
    """(good, bad) values of a field that has bounds."""
    good, bad = [None], []
    kinds = schema.get("type", [])
    if "integer" in kinds or "number" in kinds:
        good += [schema["minimum"], schema["maximum"]]
        bad += [schema["minimum"] - 1, schema["maximum"] * 2 + 1, "a", True, [1], {}]
        bad += [0.5] if "integer" in kinds else []
    elif "boolean" in kinds:
        good, bad = [None, True, False], [0, "true", []]
    elif "enum" in schema:
        good, bad = [*schema["enum"]], ["none of them", 3, []]
    elif kinds == ["string", "null"]:
        bad += [3, True, ["a"], {}]
    elif "array" in kinds and "maxItems" in schema and schema["maxItems"] < 1 << 17:
        bad += ["a", {}, [0] * (schema["maxItems"] + 1), [-1], ["a"]]
    for one in schema.get("anyOf", ()):
        if one.get("maxItems") and one["items"].get("type") == "string" and "minItems" not in one:
            good, bad = ["a", ["a"]], [3, [3], ["a"] * (one["maxItems"] + 1)]
            bad += [["a" * 1001], [""]] if "maxLength" in one["items"] else []
    return good, bad


CLASH = {"suffix", "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "best_of", "background"}
CLASH |= {"add_generation_prompt", "continue_final_message", "deadline"}
"""At their largest or least there is no room for so many, no time, or nothing that could do it."""


ALIKE = ("/v1/completions", "/v1/responses")
"""Most of their fields are those of chat."""


@pytest.mark.parametrize("path", [pytest.param(one, marks=[pytest.mark.slow] * (one in ALIKE)) for one in BODIES])
def test_bounds_are_those_that_hold(server, told, path):
    plain = dict(PLAIN)[path]
    checked = 0
    for name, schema in body_of(told, path)["properties"].items():
        if name in ("messages", "input", "prompt", "content", "model") or "description" in schema:
            continue
        good, bad = edges(schema)
        for value in () if name in CLASH else good:
            status, said = post(server, path, copy.deepcopy(plain) | {name: value} | beside(path, name))
            assert status == 200, (name, value, said)
            checked += 1
        for value in bad:
            status, said = post(server, path, copy.deepcopy(plain) | {name: value})
            assert status == 400 and re.split(r"[.\[]", said["error"]["param"])[0] == name, (name, value, said)
            jsonschema.validate(said, told["components"]["schemas"]["Error"])
            checked += 1
    assert checked >= {"/detokenize": 1, "/tokenize": 5, "/v1/embeddings": 5, "/v1/responses": 30}.get(path, 60)


def beside(path, name):
    """What a value cannot be without."""
    return {"logprobs": True} if name == "top_logprobs" and path == "/v1/chat/completions" else {}


def test_admins_have_one_of_their_own():
    made = document(Bounds(), keys=True, admin=True)
    for path, body in ADMIN:
        jsonschema.validate(body, body_of(made, path))
    assert set(ADMIN_BODIES) == {path for path, held in made["paths"].items() if "post" in held}
