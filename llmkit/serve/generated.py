"""Answers as they grow: their text, what they cost, and the record of each request, whichever route asked."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from llmkit.core.clock import now
from llmkit.inference.pieces import Answer, Piece
from llmkit.inference.request import Event, Request
from llmkit.inference.text import Texts
from llmkit.serve.caller import Caller
from llmkit.serve.refusal import Refusal
from llmkit.serve.service import Service
from llmkit.serve.usage import Usage

FORM = "response_format"
"""What a refused grammar is called where nothing else is known of it."""


@dataclass
class Account:
    """What is known of a request when it is over."""

    caller: Caller
    model: str
    """As it was named."""
    adapter: str
    unit: str
    """Whom it is for, as the client says (`user`)."""
    features: Mapping[str, float]
    category: str = ""
    """The kind of work that it is counted with."""
    form: str = FORM
    """The field that says what the answer must look like."""
    arrived: float = field(default_factory=now)
    begun: float = field(default_factory=time.monotonic)
    first: float | None = None
    """Seconds to the first token."""
    between: list[float] = field(default_factory=list)
    """Seconds between what came, answer by answer."""
    seconds: float = 0.0
    usage: Usage = field(default_factory=lambda: Usage(0))
    finish: str = "abort"
    version: int = 0
    """Of the weights."""


class Generation:
    """The answers to requests of one call, numbered over all of them."""

    def __init__(
        self, service: Service, requests: Sequence[Request], account: Account, texts: Texts | None = None
    ) -> None:
        """`texts`: what makes text of tokens, if not as everywhere."""
        self.service, self.requests, self.account = service, requests, account
        how = requests[0].sampling
        self.n = how.n
        texts = texts or service.texts
        self.answers = [Answer(texts.stream(how)) for _ in range(how.n * len(requests))]
        self.usages = [Usage(len(request.prompt)) for request in requests]
        self.last: dict[int, float] = {}
        """When the last token of each answer came."""

    async def pieces(self, patient: bool = False) -> AsyncGenerator[tuple[int, Event, Piece], None]:
        """What each event adds; the account is closed however it ends. `patient`: an answer is of use as a whole alone.

        Raises:
            Refusal: they cannot be made, or not to the end.
        """
        account, left = self.account, len(self.answers)
        try:
            async with aclosing(self._events(patient)) as events:
                async for index, event in events:
                    self.usages[index // self.n].take(event)
                    left -= event.finish is not None
                    if not left and event.finish is not None:
                        account.finish = event.finish  # until then whoever leaves has given it up
                    yield index, event, self.answers[index].take(event)
        except Refusal as cause:
            if cause.key == FORM:
                cause.key, cause.what = account.form, cause.what.replace(FORM, account.form, 1)
            account.finish = cause.code or "error"
            raise
        finally:
            account.seconds = time.monotonic() - account.begun
            account.usage = self.usage()
            self.service.done(account)

    def object(self, id: str, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What is told of them, in the shape that chat and completions share."""
        return {
            "id": id,
            "object": kind,
            "created": int(self.account.arrived),
            "model": self.account.model,
            "system_fingerprint": self.service.fingerprint(self.account.version),
            "choices": choices,
        }

    def usage(self) -> Usage:
        """Of all of them."""
        whole = Usage(0)
        for one in self.usages:
            whole.add(one)
        return whole

    def _events(self, patient: bool) -> AsyncGenerator[tuple[int, Event], None]:
        return self.service.events(self.requests, self.account.caller, self._time, patient)

    def _time(self, index: int, event: Event) -> None:
        """When it comes, and not when it is taken."""
        now, account, last = time.monotonic(), self.account, self.last
        account.version = event.version
        if not event.tokens:
            return
        if account.first is None:
            account.first = now - account.begun
        if index in last:
            account.between.append((now - last[index]) / len(event.tokens))
        last[index] = now
