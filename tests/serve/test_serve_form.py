"""Answers that must look like something, through the `openai` client."""

import json

import jsonschema
import openai
import pytest

from tests.serve.raw import post
from tests.serve.test_serve_hostile import rss

ASKED = [{"role": "user", "content": "hello world"}]
SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "level": {"enum": [1, 2, "high"]}},
    "required": ["on", "level"],
    "additionalProperties": False,
}


def formatted(schema):
    return {"type": "json_schema", "json_schema": {"name": "state", "strict": True, "schema": schema}}


def asked(client, **how):
    made = client.chat.completions.create(model="tiny", messages=ASKED, temperature=1.0, max_tokens=150, seed=3, **how)
    return made.choices[0]


def test_an_answer_has_the_form_that_is_asked_for(client):
    whole = asked(client, response_format=formatted(SCHEMA))
    assert whole.finish_reason == "stop"
    jsonschema.validate(json.loads(whole.message.content), SCHEMA)
    for outputs, wanted in (
        ({"choice": ["yes", "no"]}, ("yes", "no")),
        ({"regex": "a|b"}, ("a", "b")),
        ({"grammar": 'start: "x" | "y"'}, ("x", "y")),
        ({"json": {"const": 7}}, ("7",)),
    ):
        assert asked(client, extra_body={"structured_outputs": outputs}).message.content in wanted
    assert asked(client, response_format={"type": "text"}).message.content


VALUES = {"type": "object", "properties": {"a": {"enum": [f"v{at}" for at in range(90_000)]}}, "required": ["a"]}
BOMBS = [
    ("/v1/chat/completions", {"response_format": formatted(VALUES)}, "response_format"),
    ("/v1/chat/completions", {"structured_outputs": {"json": VALUES}}, "structured_outputs"),
    ("/v1/completions", {"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
    ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "a", "schema": VALUES}}}, "text.format"),
]


@pytest.mark.parametrize(("path", "more", "param"), BOMBS)
def test_e4_a_form_that_the_engine_refuses_is_called_as_its_client_called_it(server, path, more, param):
    asked = {"/v1/responses": {"input": "a"}, "/v1/completions": {"prompt": "a"}}.get(path, {"messages": ASKED})
    for stream in (False, True):
        status, said = post(server, asked | more | {"stream": stream}, path=path)
        assert status == 400 and said["error"]["param"] == param, said
        assert said["error"]["message"].startswith(f"{param}: cannot be enforced")
    assert post(server, {"prompt": "a", "max_tokens": 1}, path="/v1/completions")[0] == 200


@pytest.mark.parametrize(
    ("how", "param"),
    [
        ({"response_format": formatted(SCHEMA | {"not": {}})}, "response_format.json_schema.schema.not"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object"}, "stop": "x"}, "stop"),
        ({"response_format": formatted({}), "extra_body": {"structured_outputs": {"regex": "a"}}}, "response_format"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"choice": [""]}}}, "structured_outputs.choice"),
    ],
    ids=str,
)
def test_a_form_that_cannot_be_held_is_a_refusal_that_names_it(client, how, param):
    with pytest.raises(openai.BadRequestError) as refused:
        asked(client, **how)
    assert refused.value.body["param"] == param, refused.value.body
    assert "grammar." not in refused.value.body["message"]


def test_e4_a_long_name_around_many_schemas_is_not_told_for_each(server):
    """Each way to them, written out, would take 20 GB."""
    inner = {"type": "object", "properties": {f"k{at}": {} for at in range(40_000)} | {"last": {"not": {}}}}
    schema = {"type": "object", "properties": {"n" * 400_000: inner}}
    before = rss()
    for more in ({"response_format": formatted(schema)}, {"structured_outputs": {"json": schema}}):
        status, said = post(server, {"messages": ASKED} | more)
        assert status == 400 and said["error"]["message"].endswith("the keyword not cannot be enforced; leave it out")
        assert len(said["error"]["param"]) < 500
    assert rss() - before < 1 << 30
