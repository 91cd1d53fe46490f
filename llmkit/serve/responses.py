"""`/v1/responses`: what is asked, as the conversation that it stands for. Nothing is stored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llmkit.serve import chat
from llmkit.serve.caller import Caller
from llmkit.serve.chat import Chat
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.kinds import parse
from llmkit.serve.refusal import Refusal
from llmkit.serve.service import Service
from llmkit.serve.shapes import RESPONSES_IGNORED, SAME, Responding

NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
"""What the conversation calls otherwise than the client did."""
TOLD = ("instructions", "metadata", "max_output_tokens", "tools", "tool_choice", "parallel_tool_calls", "text")
"""Fields that the answer tells again."""


@dataclass(frozen=True)
class Asked:
    """A response that is to be made."""

    chat: Chat
    said: dict[str, Any]
    """The fields that the answer tells again."""


async def read(service: Service, fields: Fields, caller: Caller) -> Asked:
    """What the fields of a body ask.

    Raises:
        Refusal, RequestError: a field cannot be used.
    """
    for key, what in (("previous_response_id", "nothing is stored: send the conversation"), ("conversation", "none")):
        if fields.get(key) is not None:
            raise Refusal(404, f"{key}: {what}", key=key, code="not_found")
    said = parse(Responding, fields, service.bounds)
    if said.background:
        raise wrong("background", "an answer is made while its client waits", "unsupported_parameter")
    made = {key: value for key in SAME if (value := fields.get(key)) is not None}
    made["messages"] = _messages(fields, said.instructions)
    made["max_tokens"] = said.max_output_tokens
    made["response_format"] = _format(fields)
    tools = [_tool(Fields(tool, f"tools.{i}")) for i, tool in enumerate(fields.items("tools", 128))]
    made |= {"tools": tools or None, "tool_choice": _choice(fields)}
    if made.get("top_logprobs"):
        made["logprobs"] = True
    fields.end(RESPONSES_IGNORED)
    try:
        asked = await chat.read(
            service, Fields({key: value for key, value in made.items() if value is not None}), caller
        )
    except Refusal as cause:
        first, dot, rest = (cause.key or "").partition(".")
        cause.key = NAMES.get(first, first) + dot + rest or None
        raise
    asked.account.form = NAMES.get(asked.account.form, asked.account.form)
    return Asked(asked, {key: fields.held.get(key) for key in TOLD})


def _messages(fields: Fields, instructions: str) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if instructions:
        made.append({"role": "system", "content": instructions})
    given = fields.get("input")
    if isinstance(given, str):
        return [*made, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise wrong("input", "is no text and no list of items")
    for index, item in enumerate(given):
        _add(made, Fields(item, f"input.{index}"))
    return made


def _add(made: list[dict[str, Any]], item: Fields) -> None:
    """One item: a message, a call that was made, or what came of it."""
    kind = item.text("type", "message")
    if kind == "message":
        made.append({"role": item.text("role"), "content": item.get("content")})
    elif kind == "function_call":
        call = {"name": item.text("name"), "arguments": item.text("arguments")}
        calls = [{"id": item.text("call_id"), "type": "function", "function": call}]
        if made and made[-1].get("tool_calls"):
            made[-1]["tool_calls"] += calls
        else:
            made.append({"role": "assistant", "content": None, "tool_calls": calls})
    elif kind == "function_call_output":
        output = item.get("output")
        text = output if isinstance(output, str) else json.dumps(output)
        made.append({"role": "tool", "tool_call_id": item.text("call_id"), "content": text})
    elif kind == "reasoning":
        item.read |= item.held.keys()  # thoughts of earlier turns are not shown again
    else:
        raise wrong(item.name("type"), f"{kind[:40]!r} items are not taken", "unsupported_parameter")
    item.end(("id", "status", "phase"))


def _format(fields: Fields) -> dict[str, Any] | None:
    text = fields.object("text")
    if text is None:
        return None
    form = text.object("format")
    text.end(("verbosity",))
    if form is None:
        return None
    kind = form.text("type", "text")
    if kind != "json_schema":
        form.end()
        return {"type": kind}
    schema = {key: form.get(key) for key in ("name", "schema", "strict", "description") if key in form.held}
    form.end()
    return {"type": kind, "json_schema": schema}


def _tool(tool: Fields) -> dict[str, Any]:
    if tool.text("type") != "function":
        raise wrong(tool.name("type"), "only functions can be called", "unsupported_parameter")
    keys = ("name", "description", "parameters", "strict")
    function = {key: tool.get(key) for key in keys if tool.held.get(key) is not None}
    tool.end()
    return {"type": "function", "function": function}


def _choice(fields: Fields) -> Any:
    given = fields.get("tool_choice")
    if isinstance(given, dict) and given.get("type") == "function" and "function" not in given:
        return {"type": "function", "function": {"name": given.get("name")}}
    return given
