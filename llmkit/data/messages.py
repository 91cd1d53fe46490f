"""Messages as data sets write them: roles, content, thoughts, calls of tools and weights, under one set of names."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.data.rows import Unusable

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
"""What roles are called elsewhere."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""What a thought is called; the first is ours."""
Message = Mapping[str, Any]
Weights = tuple[float | None, ...]


def messages(given: Any, learn_from: int = 0) -> tuple[tuple[Message, ...], Weights]:
    """The messages up to the last answer, which is not before `learn_from`, and the weight that each one gives itself.

    Raises:
        Unusable: with the reason.
    """
    if not isinstance(given, list) or not given or not all(isinstance(m, dict) for m in given):
        raise Unusable("messages is not a list of messages")
    roles = [_role(message) for message in given]
    _check_order(roles)
    if "assistant" not in roles[learn_from:]:
        raise Unusable("no assistant turn in the completion")
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    # what follows the last answer can teach nothing
    kept = [_message(message, role) for message, role in zip(given[: last + 1], roles, strict=False)]
    weights = tuple(_weight(message) for message in given[: last + 1])
    return tuple(kept), weights if any(weight is not None for weight in weights) else ()


def _role(message: Message) -> str:
    said = message.get("role")
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise Unusable("a message has no role" if said is None else f"unknown role {ascii(said)[:20]}")
    return role


def _check_order(roles: Sequence[str]) -> None:
    turns = [role for role in roles if role != "system"]
    if "assistant" not in turns:
        raise Unusable("no assistant turn")
    if "system" in roles[1:] or turns[0] != "user":
        raise Unusable("roles in the wrong order")
    if any(a == b and a in ("user", "assistant") for a, b in itertools.pairwise(turns)):
        raise Unusable("roles in the wrong order")


def _message(given: Message, role: str) -> Message:
    """One message under our names; a null key is how tables say that there is none."""
    made = {k: v for k, v in given.items() if v is not None and k not in ("weight", "train", *THOUGHTS)}
    made |= {"role": role, "content": _content(given.get("content"), role)}
    if thought := _thought(given):
        made["reasoning_content"] = thought
    if made.get("tool_calls"):
        made["tool_calls"] = calls(made["tool_calls"])
    else:
        made.pop("tool_calls", None)
    said = made["content"]
    if role != "tool" and not (role == "assistant" and ("tool_calls" in made or thought)):
        text(said, f"content of {role}")
    return made


def _content(given: Any, role: str) -> Any:
    """Content as text: parts of text are joined, and what a tool gave is written as JSON."""
    if isinstance(given, list) and given and all(isinstance(part, dict) and "type" in part for part in given):
        other = next((part["type"] for part in given if part["type"] != "text"), None)
        if other is not None:
            raise Unusable(f"content of {role} holds {ascii(other)[:20]}, not text")
        given = "".join(text(part.get("text"), f"content of {role}") for part in given)
    if role == "tool":
        return given if isinstance(given, str) else "" if given is None else json.dumps(given, ensure_ascii=False)
    if given is not None and not isinstance(given, str):
        raise Unusable(f"content of {role} is not text")
    return given


def _thought(given: Message) -> str:
    said = [given[name] for name in THOUGHTS if given.get(name) is not None]
    if not all(isinstance(thought, str) for thought in said):
        raise Unusable("a thought is not text")
    if len(set(said)) > 1:
        raise Unusable("two thoughts in one message")
    return said[0] if said and said[0].strip() else ""


def calls(given: Any) -> list[dict[str, Any]]:
    """Calls of tools, their arguments as values: templates write them out.

    Raises:
        Unusable: they are none.
    """
    if not isinstance(given, list) or not all(isinstance(call, dict) for call in given):
        raise Unusable("tool_calls is not a list of calls")
    made = []
    for call in given:
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise Unusable("a tool call has no name")
        function = {"name": inner["name"], "arguments": _arguments(inner.get("arguments", inner.get("parameters")))}
        made.append(
            {**({"id": call["id"]} if call.get("id") is not None else {}), "type": "function", "function": function}
        )
    return made


def _arguments(given: Any) -> Any:
    """Arguments that are JSON text as what the text says; what is none is kept as it is."""
    if not isinstance(given, str):
        return {} if given is None else given
    try:
        said = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return said if isinstance(said, dict) else given


def arguments_as_text(given: Sequence[Message]) -> list[Message] | None:
    """The messages with the arguments of their calls as JSON text; None where there are none."""
    if not any(isinstance(a, dict) for a in _all_arguments(given)):
        return None
    made: list[Message] = []
    for message in given:
        rest = [
            {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
            for call in message.get("tool_calls") or ()
        ]
        made.append({**message, "tool_calls": rest} if rest else message)
    return made


def python_in(text: str, given: Sequence[Message]) -> bool:
    """Whether arguments stand in a text as Python writes them, which no JSON is."""
    values = [a for a in _all_arguments(given) if isinstance(a, dict) and a]
    return any(str(a) in text and _json(a) not in text for a in values)


def _all_arguments(given: Sequence[Message]) -> list[Any]:
    return [call["function"]["arguments"] for message in given for call in message.get("tool_calls") or ()]


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _weight(message: Message) -> float | None:
    """What a message weighs by its own word: `weight`, or axolotl's `train`."""
    weight, train = message.get("weight"), message.get("train")
    if message.get("train_detail") is not None:
        raise Unusable("train_detail, which is not read: give weight")
    if train is not None and not isinstance(train, bool):
        raise Unusable("train is not true or false")
    if weight is None:
        return None if train is None else float(train)
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise Unusable("a weight is not a number of 0 or more")
    if train is not None and train != (weight > 0):
        raise Unusable(f"weight and train contradict each other: {weight:g} and {str(train).lower()}")
    return float(weight)


def text(value: Any, name: str) -> str:
    """A text that says something.

    Raises:
        Unusable: it is none.
    """
    if not isinstance(value, str):
        raise Unusable(f"{name} is {'null' if value is None else 'not text'}")
    if not value.strip():
        raise Unusable(f"{name} is blank")
    return value
