"""`/v1/completions`: texts go on, with `echo` and log-probabilities."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from llmkit.inference.pieces import Piece
from llmkit.inference.request import Request, Token
from llmkit.serve.asked import most_tokens, sampling, until
from llmkit.serve.caller import Caller
from llmkit.serve.chat import tells_usage
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.foretold import category
from llmkit.serve.form import field_of
from llmkit.serve.generated import Account, Generation
from llmkit.serve.kinds import parse
from llmkit.serve.node import Bounds
from llmkit.serve.prompts import prompts
from llmkit.serve.service import Service
from llmkit.serve.shapes import IGNORED, Common, Prompted

DEFAULT = 16
"""Tokens where none are named, as OpenAI has it."""


@dataclass(frozen=True)
class Text:
    """What is asked."""

    requests: tuple[Request, ...]
    account: Account
    stream: bool
    usage: bool
    echo: bool
    logprobs: int | None
    nothing: bool
    """Whether the prompt alone is told: `max_tokens: 0` with `echo`."""


async def read(service: Service, fields: Fields, caller: Caller) -> Text:
    """What the fields of a body ask.

    Raises:
        Refusal: a field cannot be used.
    """
    bounds = service.bounds
    common, said = parse(Common, fields, bounds), parse(Prompted, fields, bounds)
    adapter = service.adapter(common.model, caller)
    if said.suffix:
        raise wrong("suffix", "text cannot be filled in before a suffix", "unsupported_parameter")
    if said.max_tokens == 0 and not said.echo:
        raise wrong("max_tokens", "0 needs echo: true")
    asked = await prompts(service, fields, "prompt", bounds.prompts)
    nothing, longest = said.max_tokens == 0, max(map(len, asked))
    most = most_tokens(1 if nothing else said.max_tokens, longest, service.longest, bounds, DEFAULT)
    more = {"logprobs": said.logprobs, "prompt_logprobs": said.logprobs if said.echo else None}
    how = sampling(fields, bounds, most, more)
    _check_many(bounds, said.best_of, len(asked), how.n)
    usage = tells_usage(fields, common.stream, bounds)
    fields.end(IGNORED)
    features, shape = {"prompts": float(len(asked))}, field_of(fields)
    account = Account(caller, common.model or service.name, adapter, common.user, features, category(fields), shape)
    last = until(common.deadline, caller.deadline, bounds)
    made = (
        Request(f"{caller.number}-{i}", ids, how, adapter, caller.tenant, deadline=last) for i, ids in enumerate(asked)
    )
    return Text(tuple(made), account, common.stream, usage, said.echo, said.logprobs, nothing)


def _check_many(bounds: Bounds, best: int | None, prompts: int, n: int) -> None:
    if best not in (None, n):
        raise wrong("best_of", "answers are not ranked: it can only be n", "unsupported_parameter")
    if prompts * n > bounds.requests:
        raise wrong("n", f"{prompts} prompts with {n} answers each are too many at once")


class TextWriter:
    """Answers in the shapes of completions."""

    def __init__(self, service: Service, asked: Text) -> None:
        self.service, self.asked = service, asked
        self.spelling = service.spelling
        self.made = Generation(service, asked.requests, asked.account)
        self.offsets = [0] * len(self.made.answers)

    async def whole(self) -> dict[str, Any]:
        """The answers when all of them are there."""
        choices: list[dict[str, Any]] = [
            {"index": i, "text": "", "logprobs": None, "finish_reason": None} for i in range(len(self.offsets))
        ]
        async with aclosing(self._parts(patient=True)) as parts:
            async for part in parts:
                choice = choices[part["index"]]
                choice["text"] += part["text"]
                choice["finish_reason"] = part["finish_reason"]
                choice["logprobs"] = _joined(choice["logprobs"], part["logprobs"])
        return self._object(choices) | {"usage": self._usage()}

    async def parts(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answers as they grow."""
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                if part["text"] or part["finish_reason"] or part["logprobs"]:
                    made = self._object([part])
                    yield made | {"usage": None} if self.asked.usage else made
        if self.asked.usage:
            yield self._object([]) | {"usage": self._usage()}

    async def _parts(self, patient: bool = False) -> AsyncGenerator[dict[str, Any], None]:
        begun: set[int] = set()
        prompts: dict[int, Sequence[Token | None] | None] = {}
        async with aclosing(self.made.pieces(patient)) as pieces:
            async for index, event, piece in pieces:
                which = index // self.made.n
                if event.prompt is not None:
                    prompts[which] = event.prompt
                if self.asked.nothing:
                    piece = Piece((), (), "length")
                if self.asked.echo and index not in begun:
                    yield self._echoed(index, which, prompts.get(which))
                begun.add(index)
                yield self._part(index, piece)

    def _echoed(self, index: int, which: int, told: Sequence[Token | None] | None) -> dict[str, Any]:
        """The prompt, as the beginning of an answer."""
        ids = self.asked.requests[which].prompt
        text = self.service.tokenizer.decode(ids)
        logprobs = None
        if self.asked.logprobs is not None and told is not None:
            logprobs = self.spelling.completion(told, ids, 0, self.asked.logprobs)
        self.offsets[index] = len(text)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _part(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self.asked.logprobs is not None and piece.tokens:
            ids = [token.id for token in piece.tokens]
            logprobs = self.spelling.completion(piece.tokens, ids, self.offsets[index], self.asked.logprobs)
            self.offsets[index] += sum(len(self.spelling.text(id)) for id in ids)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _usage(self) -> dict[str, Any]:
        whole = self.made.usage()
        whole.completion = 0 if self.asked.nothing else whole.completion
        return whole.told()

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.made.object(f"cmpl-{self.asked.account.caller.number}", "text_completion", choices)


def _joined(before: dict[str, Any] | None, more: dict[str, Any] | None) -> dict[str, Any] | None:
    if before is None or more is None:
        return more or before
    for key, held in before.items():
        held += more[key]  # in place: an answer of thousands of tokens comes token by token
    return before
