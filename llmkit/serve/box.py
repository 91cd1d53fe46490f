"""What the engine says of the requests of one call, until the one who waits for it takes it: all that has come at once.

Where many are answered, a step tells something of each: whoever is late finds the tokens of several steps, which are
then made into text, JSON and HTTP once. An answer that is told whole is taken when it has ended, and no sooner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from llmkit.inference.request import Event, Request
from llmkit.serve.refusal import Refusal

GATHERED = 256
"""Parts of an answer that wait at most: put together they take far less memory."""


class Box:
    """Filled by whoever reads the engine's socket, and emptied by the one who waits."""

    def __init__(self, requests: Sequence[Request], patient: bool, seen: Callable[[int, Event], None]) -> None:
        """`patient`: no part of an answer is of use before its end; `seen` hears of each when it comes, with the number
        of its answer, counted over all requests."""
        self.first: dict[str, int] = {}
        self.left = 0
        """Answers whose end has not been taken."""
        for request in requests:
            self.first[request.id], self.left = self.left, self.left + request.sampling.n
        self.joins = all(request.sampling.logprobs is None for request in requests)
        """Where they are asked for, each token is told by itself: so it is known which text is its own."""
        self.patient, self.seen = patient, seen
        self.held: dict[int, list[Event]] = {}
        self.refusal: Refusal | None = None
        self.there = asyncio.Event()

    def put(self, event: Event) -> None:
        """One more."""
        index = self.first[event.request] + event.index
        self.seen(index, event)
        held = self.held.setdefault(index, [])
        held.append(event)
        if not self.patient or event.finish is not None or len(held) >= GATHERED:
            self.there.set()

    def refuse(self, refusal: Refusal) -> None:
        """Nothing more comes."""
        self.refusal = refusal
        self.there.set()

    async def take(self) -> list[tuple[int, Event]]:
        """What there is, as soon as there is any; each with the number of its answer.

        Raises:
            Refusal: there is nothing, nor will be.
        """
        await self.there.wait()
        self.there.clear()
        held, self.held = self.held, {}
        if self.refusal is not None:
            self.there.set()
            if not held:
                raise self.refusal
        self.left -= sum(events[-1].finish is not None for events in held.values())
        return [(index, event) for index, events in held.items() for event in self._joined(events)]

    def _joined(self, events: list[Event]) -> Iterable[Event]:
        return joined(events) if self.joins and len(events) > 1 else events


def joined(events: Sequence[Event]) -> Iterator[Event]:
    """Those of one answer as one event; an end that is a fault stays by itself, so that what came before it is told."""
    fault = events[-1].finish in ("error", "deadline", "abort")
    *before, last = events[:-1] if fault else events
    told = (*before, last)
    yield replace(
        last,
        tokens=tuple(token for event in told for token in event.tokens),
        prompt=next((event.prompt for event in told if event.prompt is not None), None),
        cached=max(event.cached for event in told),
        drafted=sum(event.drafted for event in told),
        accepted=sum(event.accepted for event in told),
        steps=sum(event.steps for event in told),
    )
    if fault:
        yield events[-1]
