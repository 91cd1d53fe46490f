"""From what a client wrote to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.core.errors import LlmkitError
from llmkit.data.prompt import continued, rendered_ids
from llmkit.data.render import Renderer
from llmkit.serve.described import MOST_MESSAGES, PARTS
from llmkit.serve.fields import Fields, whole_numbers, wrong
from llmkit.serve.kinds import parse
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import refused
from llmkit.serve.service import Service
from llmkit.serve.shapes import MESSAGE_IGNORED, Message


async def tokens_of_text(service: Service, text: str, special: bool = True) -> tuple[int, ...]:
    """The tokens of a text as it stands; `special`: with those that a prompt begins with.

    Raises:
        Refusal: it cannot be one.
    """
    if special:
        return await service.aside(lambda: _encoded(service.renderer, text, "prompt"), len(text))
    return await service.aside(lambda: tuple(service.tokenizer.encode(text, add_special_tokens=False)), len(text))


async def prompts(service: Service, fields: Fields, key: str, most: int) -> tuple[tuple[int, ...], ...]:
    """The prompts of a field that holds a text, tokens, or a list of either.

    Raises:
        Refusal: it holds something else, or too many.
    """
    value = fields.get(key)
    if isinstance(value, str):
        return (await service.aside(lambda: _encoded(service.renderer, value, key), len(value)),)
    if not isinstance(value, list) or not value:
        raise wrong(key, "is no text, no tokens, and no list of them")
    if isinstance(value[0], int):
        return (own_ids(service, whole_numbers(value, key), key),)
    if len(value) > most:
        raise wrong(key, f"{len(value)} prompts are more than {most}")
    if not all(isinstance(item, str) or (isinstance(item, list) and item) for item in value):
        raise wrong(key, "holds something that is neither a text nor tokens")
    letters = sum(len(item) for item in value)
    return tuple(await service.aside(lambda: [_one(service, item, key) for item in value], letters))


def _one(service: Service, item: str | list[Any], key: str) -> tuple[int, ...]:
    if isinstance(item, str):
        return _encoded(service.renderer, item, key)
    return own_ids(service, whole_numbers(item, key), key)


async def tokens_of_chat(
    service: Service, messages: Sequence[dict[str, Any]], tools: Sequence[Any], begun: bool = False
) -> tuple[int, ...]:
    """The tokens of a conversation, up to where its answer begins; `begun`: up to where its last message ends, which is
    the beginning of the answer.

    Raises:
        Refusal: the template cannot render it.
    """
    letters = _letters(messages) + _letters(tools)
    return await service.aside(lambda: _encoded(service.renderer, messages, "messages", tools, begun), letters)


def _letters(said: Any) -> int:
    """Of all texts in it, keys too."""
    if isinstance(said, str):
        return len(said)
    if isinstance(said, Mapping):
        return sum(len(key) + _letters(value) for key, value in said.items())
    return sum(map(_letters, said)) if isinstance(said, list | tuple) else 1


def goes_on(more: bool, own: bool | None, messages: Sequence[dict[str, Any]]) -> bool:
    """Whether the answer goes on with the last message (`continue_final_message`), or is a message of its own
    (`add_generation_prompt`).

    Raises:
        Refusal: both or neither are asked for, or the last message is no assistant's.
    """
    if own == more:
        raise wrong("add_generation_prompt", "is either this or continue_final_message")
    last = messages[-1]
    if more and (last["role"] != "assistant" or not last["content"] or "tool_calls" in last):
        raise wrong("continue_final_message", "the last message is no text of an assistant")
    return more


def _encoded(
    renderer: Renderer, prompt: Any, key: str, tools: Sequence[Any] = (), begun: bool = False
) -> tuple[int, ...]:
    try:
        if begun:
            return tuple(continued(renderer, prompt[:-1], prompt[-1]["content"], tools)[0])
        return tuple(rendered_ids(renderer, prompt, tools))
    except LlmkitError as cause:
        if cause.problems[0].key == "tools":
            what = "the model's chat template shows no tools; ask without tools, or serve it with --template NAME"
            raise wrong("tools", what, "unsupported_parameter") from cause
        raise wrong(key, refused(cause).what) from cause


def own_ids(service: Service, ids: tuple[int, ...], key: str) -> tuple[int, ...]:
    """Tokens that the vocabulary has.

    Raises:
        Refusal: one is none, or the vocabulary is not known yet.
    """
    words = service.words
    if bad := [id for id in ids if not 0 <= id < words]:
        raise wrong(key, f"token {str(bad[0])[:40]} is none of the {words} of the vocabulary")
    return ids


def messages(fields: Fields, bounds: Bounds) -> list[dict[str, Any]]:
    """The conversation.

    Raises:
        Refusal: a message is none.
    """
    found = fields.items("messages", MOST_MESSAGES)
    if not found:
        raise wrong("messages", "is missing" if fields.get("messages") is None else "is empty")
    return [_message(Fields(item, f"messages.{index}"), bounds) for index, item in enumerate(found)]


def _message(fields: Fields, bounds: Bounds) -> dict[str, Any]:
    said = parse(Message, fields, bounds)
    made: dict[str, Any] = {"role": {"developer": "system", "function": "tool"}.get(said.role, said.role)}
    made["content"] = content(fields)
    calls = fields.items("tool_calls", 128)
    if calls:
        made["tool_calls"] = [_call(Fields(item, f"{fields.at}.tool_calls.{i}")) for i, item in enumerate(calls)]
    made |= {key: text for key in ("name", "tool_call_id", "reasoning_content") if (text := getattr(said, key))}
    if said.role in ("user", "system", "developer") and said.content is None:
        raise wrong(fields.name("content"), "is missing")
    fields.end(MESSAGE_IGNORED)
    return made


def content(fields: Fields) -> str:
    """A text, or parts of one.

    Raises:
        Refusal: it is neither.
    """
    value = fields.get("content")
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise wrong(fields.name("content"), "is neither a text nor a list of parts")
    parts = []
    for index, item in enumerate(value):
        part = Fields(item, f"{fields.name('content')}.{index}")
        part.choice("type", "text", PARTS)
        parts.append(part.text("text"))
        part.end(("annotations", "logprobs", "refusal"))
    return "".join(parts)


def _call(fields: Fields) -> dict[str, Any]:
    fields.choice("type", "function", ("function",))
    function = fields.object("function")
    if function is None:
        raise wrong(fields.name("function"), "is missing")
    made = {
        "id": fields.text("id"),
        "type": "function",
        "function": {"name": function.text("name"), "arguments": function.text("arguments")},
    }
    function.end()
    fields.end(("index",))
    return made
