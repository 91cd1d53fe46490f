"""Good requests over all routes: what a fuzz begins with, and what the server's own document must hold."""

from __future__ import annotations

from typing import Any

USER = {"role": "user", "content": "hello world"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "level": {"enum": [1, 2, "high"]}},
    "required": ["on"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "state", "strict": True, "schema": SCHEMA}}

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SAMPLED: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.01,
    "seed": 7,
    "stop": ["zzz"],
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": -1.5},
    "min_tokens": 1,
    "stop_token_ids": [3],
    "bad_words": ["nope"],
    "deadline": 60,
}


def chat(**more: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"model": "tiny", "messages": [USER], "max_tokens": 2, "temperature": 0} | more


def text(**more: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"model": "tiny", "prompt": "hello", "max_tokens": 2, "temperature": 0} | more


def response(**more: Any) -> tuple[str, dict[str, Any]]:
    return RESPONSES, {"model": "tiny", "input": "hello", "max_output_tokens": 2, "temperature": 0} | more


TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "world"}]},
    {"role": "assistant", "content": "yes", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "user", "content": "and now?", "name": "ann"},
]
ITEMS = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
    {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    {"role": "user", "content": "and now?"},
]

GOOD: list[tuple[str, dict[str, Any]]] = [
    chat(),
    chat(messages=TURNS),
    chat(**SAMPLED),
    chat(n=2, logprobs=True, top_logprobs=3, temperature=1.0),
    chat(stream=True, stream_options={"include_usage": True}),
    chat(tools=[WEATHER], tool_choice="auto", parallel_tool_calls=False),
    chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "get_weather"}}, max_tokens=24),
    chat(tools=[WEATHER], tool_choice="required", stream=True, max_tokens=24),
    chat(response_format=FORMAT, max_tokens=24),
    chat(response_format={"type": "json_object"}, max_tokens=24, max_completion_tokens=12),
    chat(structured_outputs={"regex": "[a-f]{1,4}(-[0-9]+)?"}),
    chat(structured_outputs={"choice": ["yes", "no"]}),
    chat(structured_outputs={"json": SCHEMA}, max_tokens=24),
    chat(structured_outputs={"grammar": 'start: "x" | "(" start ")"'}, stream=True),
    chat(user="ann", metadata={"a": "b"}, store=False, allowed_token_ids=[5, 6, 7], ignore_eos=True),
    text(),
    text(prompt=["hello", "world"], n=2, logprobs=2, echo=True, best_of=2),
    text(prompt=[5, 6, 7, 8], stream=True, stream_options={"include_usage": True}),
    text(prompt=[[5, 6], [7, 8]], **SAMPLED | {"stop": "zzz"}),
    text(max_tokens=0, echo=True, logprobs=1),
    response(),
    response(input=ITEMS, instructions="be brief", metadata={"a": "b"}, store=False),
    response(stream=True, top_logprobs=2),
    response(tools=[{"type": "function", **WEATHER["function"]}], tool_choice="required", max_output_tokens=24),
    response(text={"format": {"type": "json_schema", "name": "state", "schema": SCHEMA, "strict": True}}),
    ("/v1/embeddings", {"model": "tiny", "input": ["hello", "world"], "encoding_format": "base64"}),
    ("/v1/embeddings", {"input": [5, 6, 7], "pooling": "last", "user": "ann"}),
    ("/tokenize", {"prompt": "hello world", "add_special_tokens": False, "return_token_strs": True}),
    ("/tokenize", {"messages": [USER], "tools": [WEATHER]}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]
ADMIN: list[tuple[str, dict[str, Any]]] = [
    ("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "none", "tenant": "ann", "load_inplace": False}),
    ("/v1/unload_lora_adapter", {"lora_name": "new", "lora_int_id": 3}),
    ("/admin/reset_prefix_cache", {}),
    ("/admin/weights", {"path": "none"}),
    ("/admin/resume", {}),
]
"""Those of a listener of its own; `/admin/pause` is left out of a fuzz: all that follows would wait."""
GETS = [
    *("/v1/models", "/v1/models/tiny", "/v1/responses/resp_1", "/health", "/metrics", "/"),
    *("/playground/main.js", "/openapi.json"),
]
