"""How much is taken on: so many answers and so many tokens of prompts, of one tenant no more than its share, of one key
no more than it may ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llmkit.serve.caller import Caller
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import Refusal

WAIT = 1.0
"""Seconds after which a client that was refused may come back."""


class Gate:
    """Counts what was accepted and is not finished."""

    def __init__(self, bounds: Bounds, tenants: Callable[[], int] = lambda: 1) -> None:
        """`tenants`: how many there are; where there are several, none takes the room of all."""
        self.bounds, self.tenants = bounds, tenants
        self.answers: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.keys: Counter[str] = Counter()
        """Answers by the digest of a key."""

    def check(self, caller: Caller, answers: int = 1, tokens: int = 1) -> None:
        """Whether there is room.

        Raises:
            Refusal: 429, there is none now; 400, there can never be.
        """
        share = self.bounds.share if self.tenants() > 1 else 1.0
        for what, held, more, most in (
            ("answers", self.answers, answers, self.bounds.requests),
            ("tokens of prompts", self.tokens, tokens, self.bounds.tokens),
        ):
            _fit(what, held[caller.tenant], more, max(1, int(most * share)))
            _fit(what, held.total(), more, most)
        if caller.key is not None and (most := caller.key.limits.requests):
            _fit("answers", self.keys[caller.key.digest], answers, most)

    @contextmanager
    def place(self, caller: Caller, answers: int, tokens: int) -> Iterator[None]:
        """Room for as long as it is needed.

        Raises:
            Refusal: as `check`.
        """
        self.check(caller, answers, tokens)
        key = "" if caller.key is None else caller.key.digest
        held = ((self.answers, caller.tenant, answers), (self.tokens, caller.tenant, tokens), (self.keys, key, answers))
        for counts, name, more in held:
            counts[name] += more
        try:
            yield
        finally:
            for counts, name, more in held:
                counts[name] -= more
                if not counts[name]:
                    del counts[name]


def _fit(what: str, held: int, more: int, most: int) -> None:
    if more > most:
        raise Refusal(400, f"the request asks for {more} {what}, and {most} are taken at once", code="too_large")
    if held + more > most:
        raise Refusal(429, f"too many {what} wait already; come back later", code="overloaded", wait=WAIT)
