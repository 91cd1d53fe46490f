"""What routes answer, as the server's own document tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmkit.serve.described import STRING, Schema, listed

WHOLE: Schema = {"type": "integer"}
MAYBE: Schema = {"type": ["string", "null"]}


def told(**held: Schema) -> Schema:
    """An object that has at least these."""
    return {"type": "object", "properties": held, "required": list(held)}


@dataclass(frozen=True)
class Answer:
    """One that is good."""

    what: str
    content: Schema


def as_json(what: str, schema: Schema, stream: bool = False) -> Answer:
    """JSON; with `stream: true` server-sent events, where a route has them: OpenAPI 3.1 has no word for one of them."""
    content: Schema = {"application/json": {"schema": schema}}
    return Answer(what, content | ({"text/event-stream": {}} if stream else {}))


ERROR = told(error=told(message=STRING, type=STRING, param=MAYBE, code=MAYBE))
USAGE = told(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE)
FINISH: Schema = {"type": "string", "enum": ["stop", "length", "tool_calls"]}
MESSAGE = told(role={"const": "assistant"}, content=MAYBE)
CHAT_CHOICE = told(index=WHOLE, message=MESSAGE, finish_reason=FINISH)
TEXT_CHOICE = told(index=WHOLE, text=STRING, finish_reason=FINISH)
MODEL = told(id=STRING, object={"const": "model"}, created=WHOLE, owned_by=STRING)
VECTOR = told(index=WHOLE, embedding={"anyOf": [listed({"type": "number"}), STRING]})
TOKEN: Schema = {"anyOf": [WHOLE, told(id=WHOLE, piece=STRING)]}
DONE = as_json("it was done", told(status={"const": "ok"}))

ANSWERS: Mapping[str, Answer | None] = {
    "/health": as_json("requests are answered", told(status=STRING)),
    "/metrics": Answer("for Prometheus", {"text/plain": {"schema": STRING}}),
    "/openapi.json": as_json("this document", told(openapi=STRING, paths={"type": "object"})),
    "/v1/models": as_json("what can be named as `model`", told(object={"const": "list"}, data=listed(MODEL))),
    "/v1/models/{name}": as_json("one model", MODEL),
    "/v1/responses/{id}": None,
    "/v1/chat/completions": as_json(
        "answers to a conversation",
        told(id=STRING, object={"const": "chat.completion"}, choices=listed(CHAT_CHOICE), usage=USAGE),
        stream=True,
    ),
    "/v1/completions": as_json(
        "texts that go on",
        told(id=STRING, object={"const": "text_completion"}, choices=listed(TEXT_CHOICE), usage=USAGE),
        stream=True,
    ),
    "/v1/responses": as_json(
        "a response", told(id=STRING, object={"const": "response"}, status=STRING, output=listed({})), stream=True
    ),
    "/v1/embeddings": as_json("vectors of length 1", told(object={"const": "list"}, data=listed(VECTOR))),
    "/tokenize": as_json("tokens", told(tokens=listed(TOKEN), count=WHOLE)),
    "/detokenize": as_json("a text", told(prompt=STRING, content=STRING)),
    "/v1/load_lora_adapter": DONE,
    "/v1/unload_lora_adapter": DONE,
    "/admin/weights": DONE,
    "/admin/pause": DONE,
    "/admin/resume": DONE,
    "/admin/reset_prefix_cache": DONE,
}
"""By path; none where there is no good answer."""
