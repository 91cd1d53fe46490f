"""Text by our engine: all that is asked runs together, and is told in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from llmkit.inference.collect import Collected
from llmkit.inference.request import Ask, Completion
from llmkit.inference.turns import Turns

AHEAD = 4
"""Times as many asks as run at once are taken on: one that takes long must not leave the engine without work."""


class EngineWriter:
    """The `engine` member of the `generator` union, open."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def each(self, asks: Iterable[Ask]) -> Iterator[Completion]:
        """A completion for each ask, in their order.

        Raises:
            RequestError: one can never be answered; nothing of the others is left in the engine then.
        """
        coming, flying = iter(asks), deque[Collected]()
        most = AHEAD * self.turns.engine.scheduler.limits.sequences
        try:
            while True:
                for ask in islice(coming, most - len(flying)):
                    flying.append(Collected(self.turns.add(ask), self.turns.engine.texts))
                if not flying:
                    return
                yield self._ended(flying[0])
                flying.popleft()
        finally:
            for one in flying:
                self.turns.drop(one.request.id)

    def _ended(self, one: Collected) -> Completion:
        while not one.take(self.turns.next(one.request.id)):
            pass
        self.turns.drop(one.request.id)
        return one.completion()

    def close(self) -> None:
        """The engine goes with the last who holds it."""
