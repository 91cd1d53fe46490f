"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from llmkit.inference.request import Event, Request
from llmkit.inference.sampling import Sampling
from llmkit.serve.answer import Answer, Piece
from llmkit.serve.asked import IGNORED, most_tokens, sampling
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.prompts import messages, tokens_of_chat
from llmkit.serve.service import Caller, Service
from llmkit.serve.told import Spelling
from llmkit.serve.usage import Usage


@dataclass(frozen=True)
class Chat:
    """What is asked."""

    request: Request
    model: str
    stream: bool
    usage: bool
    """Whether a stream ends with how many tokens there were."""
    logprobs: bool


async def read(service: Service, fields: Fields, caller: Caller) -> Chat:
    """What the fields of a body ask.

    Raises:
        Refusal: a field cannot be used.
    """
    model = fields.text("model")
    adapter = service.adapter(model, caller)
    said = messages(fields)
    prompt = await tokens_of_chat(service, said, ())
    given = fields.whole_or_none("max_completion_tokens", 1, 1 << 31)
    older = fields.whole_or_none("max_tokens", 1, 1 << 31)
    most = most_tokens(older if given is None else given, len(prompt), service.longest, service.bounds)
    logprobs, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, 0, service.bounds.logprobs)
    if top and not logprobs:
        raise wrong("top_logprobs", "needs logprobs: true")
    how = sampling(fields, service.bounds, most, {"logprobs": top if logprobs else None})
    stream, usage = streams(fields)
    fields.end(IGNORED)
    request = Request(caller.id, prompt, how, adapter, caller.tenant)
    return Chat(request, model or service.name, stream, usage, logprobs)


def streams(fields: Fields) -> tuple[bool, bool]:
    """Whether it is to be streamed, and whether the stream tells its usage."""
    stream, options = fields.flag("stream"), fields.object("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise wrong("stream_options", "needs stream: true")
    usage = options.flag("include_usage")
    options.end(("include_obfuscation",))
    return stream, usage


class Writer:
    """Answers in the shapes of chat."""

    def __init__(self, service: Service, asked: Chat) -> None:
        self.service, self.asked = service, asked
        self.spelling = Spelling(service.tokenizer)
        self.made, self.id = int(time.time()), f"chatcmpl-{asked.request.id}"
        how: Sampling = asked.request.sampling
        self.answers = [Answer(service.texts.stream(how)) for _ in range(how.n)]
        self.usage = Usage(len(asked.request.prompt))

    async def whole(self) -> dict[str, Any]:
        """The answers when all of them are there."""
        texts, tokens, ends = [""] * len(self.answers), [[] for _ in self.answers], [""] * len(self.answers)  # type: ignore[var-annotated]
        async for index, piece in self._pieces():
            texts[index] += piece.text
            tokens[index] += piece.tokens
            ends[index] = piece.finish or ""
        choices = []
        for index, (text, end) in enumerate(zip(texts, ends, strict=True)):
            message = {"role": "assistant", "content": text, "refusal": None}
            told = {"content": self.spelling.chat(tokens[index]), "refusal": None} if self.asked.logprobs else None
            choices.append({"index": index, "message": message, "logprobs": told, "finish_reason": end})
        return self._object("chat.completion", choices) | {"usage": self.usage.told()}

    async def parts(self) -> AsyncIterator[dict[str, Any]]:
        """The answers as they grow."""
        begun: set[int] = set()
        async for index, piece in self._pieces():
            if index not in begun:
                begun.add(index)
                yield self._part(index, {"role": "assistant", "content": ""})
            told = {"content": self.spelling.chat(piece.tokens), "refusal": None} if self.asked.logprobs else None
            if piece.text or (told and piece.tokens):
                yield self._part(index, {"content": piece.text}, told)
            if piece.finish is not None:
                yield self._part(index, {}, None, piece.finish)
        if self.asked.usage:
            yield self._object("chat.completion.chunk", []) | {"usage": self.usage.told()}

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        async for index, event in self.service.events([self.asked.request]):
            self._count(event)
            yield index, self.answers[index].take(event)

    def _count(self, event: Event) -> None:
        self.usage.take(event)

    def _part(
        self, index: int, delta: dict[str, Any], told: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}
        made = self._object("chat.completion.chunk", [choice])
        return made | {"usage": None} if self.asked.usage else made

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.made,
            "model": self.asked.model,
            "system_fingerprint": self.service.fingerprint,
            "choices": choices,
        }
