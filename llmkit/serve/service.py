"""What all routes share: the engine, the tokenizer, what is served under which name, and how much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from llmkit.core.clock import now
from llmkit.data.render import Renderer
from llmkit.inference.request import Event, Request
from llmkit.inference.said.formats import Format, format_of
from llmkit.inference.text import Texts
from llmkit.serve.box import Box
from llmkit.serve.caller import Caller
from llmkit.serve.gate import Gate
from llmkit.serve.keys import Meter
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import Fault, Refusal
from llmkit.serve.remote import Remote
from llmkit.serve.told import Spelling

T = TypeVar("T")
SHORT = 2048
"""Letters that are made into tokens within about a millisecond."""


@dataclass
class Service:
    """A server without its HTTP."""

    name: str
    """Under which the model is served."""
    engine: Remote
    tokenizer: Any
    bounds: Bounds = Bounds()
    began: float = field(default_factory=now)
    """Seconds since the epoch."""
    draining: bool = False
    """Whether no more is taken on."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Name -> whose it is; empty is everybody's."""
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "tokens"))
    """Where prompts are made into tokens: a long one delays no other client."""

    watchers: list[Callable[[Any], None]] = field(default_factory=list)
    """Told of each request that is over."""

    def done(self, account: Any) -> None:
        """A request is over."""
        if account.caller.key is not None:
            self.meter.spend(account.caller.key, "tpm", account.usage.completion)
        for told in self.watchers:
            told(account)

    def adapter(self, model: str, caller: Caller) -> str:
        """The adapter that is meant by a model's name; empty for the model itself.

        Raises:
            Refusal: 404, there is none of that name for this caller.
        """
        if model in ("", self.name):
            return ""
        if model in self.adapters and self.adapters[model] in ("", caller.tenant):
            return model
        raise Refusal(404, f"model: no model is named {model[:80]!r}", key="model", code="model_not_found")

    def models(self, caller: Caller) -> list[str]:
        """What a caller can name."""
        return [self.name, *(name for name, owner in self.adapters.items() if owner in ("", caller.tenant))]

    @cached_property
    def texts(self) -> Texts:
        """What makes text of tokens."""
        return Texts(self.tokenizer)

    @cached_property
    def chat_texts(self) -> dict[bool, Texts]:
        """The same where those special tokens have text that a chat's answers are read by: without tools, and with."""
        return {tools: Texts(self.tokenizer, self.format.shown(tools)) for tools in (False, True)}

    @cached_property
    def spelling(self) -> Spelling:
        """Single tokens as texts."""
        return Spelling(self.tokenizer)

    def fingerprint(self, version: int) -> str:
        """Of what answers: the same weights, the same fingerprint. `version`: how often they were replaced."""
        read = "fp_" + str(self.engine.facts.get("model", {}).get("sha256", ""))[:10]
        return f"{read}_{version}" if version else read

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its answer together.

        Raises:
            Refusal: there is no engine that could say so.
        """
        known = self._known("longest")
        return min(known, self.bounds.length or known)

    @property
    def words(self) -> int:
        """Tokens of the vocabulary.

        Raises:
            Refusal: as `longest`.
        """
        return self._known("words")

    def _known(self, name: str) -> int:
        if name not in self.engine.facts:
            raise Refusal(503, "the model is being loaded; ask again", code="not_ready", wait=2)
        return int(self.engine.facts[name])

    @cached_property
    def renderer(self) -> Renderer:
        """From what is asked to tokens, as training renders it."""
        return Renderer(self.tokenizer)

    @cached_property
    def format(self) -> Format:
        """How the model writes tool calls and reasoning."""
        return format_of(self.tokenizer.chat_template or "")

    def thinks(self, prompt: Sequence[int]) -> bool:
        """Whether the end of a prompt has begun the model's reasoning."""
        return self.format.begun(self.tokenizer.decode(list(prompt[-16:])))

    @cached_property
    def meter(self) -> Meter:
        """What keys have used of their minute."""
        return Meter()

    @cached_property
    def gate(self) -> Gate:
        """How much is taken on."""
        return Gate(self.bounds)

    async def aside(self, work: Callable[[], T], size: int) -> T:
        """What `work` gives on text of `size` letters. A long one is worked on beside the loop; to hand a short one
        to a thread costs more than the work does."""
        if size <= SHORT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    @contextmanager
    def place(self, caller: Caller, answers: int, tokens: int) -> Iterator[None]:
        """Room for as long as it is needed; what is let in uses up the tokens of its key's minute.

        Raises:
            Refusal: there is none, or its key has asked for too much.
        """
        with self.gate.place(caller, answers, tokens):
            if caller.key is not None:
                self.meter.take(caller.key, {"tpm": tokens})
            yield

    async def events(
        self, requests: Sequence[Request], caller: Caller, seen: Callable[[int, Event], None], patient: bool = False
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """What comes, with the number of its answer, counted over all requests, until all answers have ended; `seen`
        and `patient` as a `Box` has them.

        Raises:
            Refusal: there is no room, or one of them was refused, failed, or came too late.
        """
        box, tokens = Box(requests, patient, seen), sum(len(request.prompt) for request in requests)
        with self.place(caller, box.left, tokens):
            async with self.engine.ask(requests, box):
                while box.left:
                    for index, event in await box.take():
                        _check(event)
                        yield index, event


def _check(event: Event) -> None:
    if event.trace:
        raise Fault(event.trace)
    if event.finish == "error":
        raise Refusal(400, f"this answer failed: {event.why}", code="generation_failed")
    if event.finish == "deadline":
        raise Refusal(408, "the deadline passed", key="deadline", code="deadline_exceeded")
    if event.finish == "abort":
        raise Refusal(503, "the answer was given up", code="aborted", wait=1)
