"""Requests and answers in llama.cpp's words, and in ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ROUTES = {"/completion": "/v1/completions", "/chat/completions": "/v1/chat/completions", "/models": "/v1/models"}
WORDS = {"n_predict": "max_tokens", "n_probs": "logprobs"}
OWN = (
    "model",
    "id_slot",
    "cache_prompt",
    "return_progress",
    "return_tokens",
    "timings_per_token",
    "verbose",
    "response_fields",
    "post_sampling_probs",
    "backend_sampling",
)
"""Fields of that server alone; it reads no model's name."""


def asked(server: Any, path: str, data: Any) -> tuple[str, Any]:
    """A route of ours and its body; what a server's start-up settings say is said by each request."""
    route = ROUTES.get(path, path)
    if not isinstance(data, dict):
        return route, data
    body = {WORDS.get(key, key): value for key, value in data.items() if key not in OWN}
    if route.endswith("completions"):
        body = {"seed": server.seed, "temperature": server.temperature} | body
    if path == "/completion":
        room = server.n_predict or 64
        body.setdefault("max_tokens", room if room > 0 else server.n_ctx // 2)
    if isinstance(body.get("logit_bias"), list):
        body["logit_bias"] = {str(token): bias for token, bias in body["logit_bias"]}
    if "embeddings" in route and server.pooling:
        body["pooling"] = server.pooling
    if "chat/completions" in route and "json_schema" in body:
        schema = {"name": "x", "schema": body.pop("json_schema")}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return route, body


def told(path: str, data: Any, made: Any) -> Any:
    """A whole answer of `/completion`; others are as they are."""
    if path != "/completion" or "choices" not in made:
        return made
    found = [{"content": choice["text"], "tokens": []} for choice in made["choices"]]
    several = isinstance(data["prompt"], list) and not isinstance(data["prompt"][0], int)
    return found if several else found[0]


def told_in_parts(path: str, made: Any) -> Iterator[Any]:
    """One part of its stream: what is said, and then that it stops."""
    if path != "/completion":
        yield made
        return
    for choice in made["choices"]:
        if choice["text"]:
            yield {"content": choice["text"], "stop": False}
        if choice["finish_reason"]:
            yield {"content": "", "stop": True, "stop_type": choice["finish_reason"].replace("length", "limit")}
