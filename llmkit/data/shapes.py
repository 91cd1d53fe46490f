"""The formats of rows for supervised training: which keys make one, and what it must hold to be trained on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

from llmkit.data.rows import DEEPEST, Row, Unusable, measured

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
"""ShareGPT's names of the roles."""


READ = ("messages", "prompt", "completion", "text", "instruction", "output", "conversations")
"""The columns that a row may be made of."""


def shaped(values: Mapping[str, Any], id: int) -> Row:
    """A row in one of the known formats: messages, prompt and completion, text, Alpaca's or ShareGPT's.

    Raises:
        Unusable: with the reason.
    """
    nulls = [name for name in READ if name in values and values[name] is None]
    values = {name: value for name, value in values.items() if value is not None}  # how tables say: no such column
    cluster, tools = str(values.get("cluster", id)), _tools(values.get("tools"))
    if "messages" in values:
        return Row(id, cluster, _messages(values["messages"]), 0, tools=tools)
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return Row(id, cluster, _messages([*prompt, *completion], len(prompt)), len(prompt), tools=tools)
    if "completion" in values:
        return Row(id, cluster, prompt=_text(prompt, "prompt"), completion=_text(completion, "completion"))
    if "text" in values:
        return Row(id, cluster, completion=_text(values["text"], "text"))
    if "instruction" in values and "output" in values:
        return Row(id, cluster, _alpaca(values), tools=tools)
    if "conversations" in values:
        return Row(id, cluster, _messages(_sharegpt(values["conversations"])), tools=tools)
    raise Unusable(f"{nulls[0]} is null" if nulls else "no messages, prompt and completion, or text")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"{name} is {'null' if value is None else 'not text'}")
    if not value.strip():
        raise Unusable(f"{name} is blank")
    return value


def _tools(given: Any) -> tuple[Any, ...]:
    if isinstance(given, str):  # parquet holds no list of unlike objects, so that data sets keep them as JSON text
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as cause:
            raise Unusable("tools is text and not JSON") from cause
        if measured(given)[1] > DEEPEST:
            raise Unusable(f"tools nests more than {DEEPEST} deep")
    if given is not None and not (isinstance(given, list) and all(isinstance(tool, dict) for tool in given)):
        raise Unusable("tools is not a list of objects")
    return tuple(given or ())


def _alpaca(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    given = values.get("input") or ""
    asked = _text(values["instruction"], "instruction") + (f"\n\n{_text(given, 'input')}" if given else "")
    answer = _text(values["output"], "output")
    return {"role": "user", "content": asked}, {"role": "assistant", "content": answer}


def _sharegpt(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
        raise Unusable("conversations is not a list of turns")
    unknown = [turn.get("from") for turn in given if str(turn.get("from")) not in SPEAKERS]
    if unknown:
        raise Unusable(f"a turn is from {str(unknown[0])[:20]!r}")
    return [{"role": SPEAKERS[turn["from"]], "content": turn.get("value")} for turn in given]


def _messages(given: Any, learn_from: int = 0) -> tuple[Mapping[str, Any], ...]:
    """The messages up to the last answer, which is not before `learn_from`."""
    if not isinstance(given, list) or not given or not all(isinstance(m, dict) for m in given):
        raise Unusable("messages is not a list of messages")
    roles = [m.get("role") for m in given]
    _check_order(roles)
    if "assistant" not in roles[learn_from:]:
        raise Unusable("no assistant turn in the completion")
    for message in given:
        if not (message.get("role") == "assistant" and message.get("tool_calls")):
            _text(message.get("content"), f"content of {message.get('role')}")
    last = max(i for i, message in enumerate(given) if message["role"] == "assistant")
    # what follows the last answer can teach nothing; a null key is how tables say that there is none
    return tuple({k: v for k, v in m.items() if v is not None or k == "content"} for m in given[: last + 1])


def _check_order(roles: list[Any]) -> None:
    turns = [role for role in roles if role != "system"]
    if "assistant" not in turns:
        raise Unusable("no assistant turn")
    if "system" in roles[1:] or turns[0] != "user" or any(r not in ("user", "assistant", "tool") for r in turns):
        raise Unusable("roles in the wrong order")
    if any(a == b and a in ("user", "assistant") for a, b in itertools.pairwise(turns)):
        raise Unusable("roles in the wrong order")
