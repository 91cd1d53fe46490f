"""How much is taken on: so many answers and so many tokens of prompts, of one tenant no more than its share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from llmkit.serve.caller import Caller
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import Refusal

WAIT = 1.0
"""Seconds after which a client that was refused may come back."""


class Gate:
    """Counts what was accepted and is not finished."""

    def __init__(self, bounds: Bounds, tenants: int = 1) -> None:
        """`tenants`: how many there are; where there are several, none takes the room of all."""
        self.bounds, self.tenants = bounds, tenants
        self.answers: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    def check(self, caller: Caller, answers: int = 1, tokens: int = 1) -> None:
        """Whether there is room.

        Raises:
            Refusal: 429, there is none now; 400, there can never be.
        """
        share = self.bounds.share if self.tenants > 1 else 1.0
        own_most = caller.key.limits.requests if caller.key is not None else 0
        self._within("answers", self.answers, caller.tenant, answers, self.bounds.requests, share, own_most)
        self._within("tokens of prompts", self.tokens, caller.tenant, tokens, self.bounds.tokens, share, 0)

    def _within(
        self, what: str, held: Counter[str], tenant: str, more: int, most: int, share: float, own_most: int
    ) -> None:
        own = min(max(1, int(most * share)), own_most or most)
        if more > own:
            raise Refusal(400, f"the request asks for {more} {what}, and {own} are taken at once", code="too_large")
        if held[tenant] + more > own or held.total() + more > most:
            raise Refusal(429, f"too many {what} wait already; come back later", code="overloaded", wait=WAIT)

    @contextmanager
    def place(self, caller: Caller, answers: int, tokens: int) -> Iterator[None]:
        """Room for as long as it is needed.

        Raises:
            Refusal: as `check`.
        """
        self.check(caller, answers, tokens)
        tenant = caller.tenant
        self.answers[tenant] += answers
        self.tokens[tenant] += tokens
        try:
            yield
        finally:
            self.answers[tenant] -= answers
            self.tokens[tenant] -= tokens
            if not self.answers[tenant]:
                del self.answers[tenant], self.tokens[tenant]
