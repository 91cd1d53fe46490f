"""Trees of drafts that cost nothing: what was found by looking back, with branches of what the model thought likely."""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Seq

from llmkit.inference.runner import Rows
from llmkit.inference.scheduler import Chunk
from llmkit.inference.speculation.drafter import Ask, Draft, Drafter, Reading
from llmkit.inference.speculation.recycled import Recycled

FOUND = 0.75
"""How often a draft that was found is right, and in THOUGHT one by its place among the likeliest: by these it is
settled what is branched from first; what is looked at goes by what is measured."""
THOUGHT = (0.4, 0.12, 0.07, 0.05, 0.04, 0.03, 0.03, 0.02)
Twig = tuple[float, int, int, int, int, int]
"""A draft that may come into a tree: the negative of how likely it is, its age, what it follows, its token, its class,
and its place in what was found (-1: none)."""


class Branched:
    """A `Drafter` of the chains of another, and of what the model thought likely after each of their tokens."""

    free = True

    def __init__(self, found: Drafter, recycled: Recycled) -> None:
        self.found, self.recycled = found, recycled
        self.classes = found.classes + len(THOUGHT)

    def see(self, chunks: Seq[Chunk], rows: Seq[Rows]) -> None:
        """What the model thinks of a step's tokens."""
        seen = [
            (chunk.sequence.request.tenant, chunk.tokens[-len(each.tail) :], each.tail)
            for chunk, each in zip(chunks, rows, strict=True)
            if each.tail is not None
        ]
        self.recycled.see(seen)

    def read(self, asks: Seq[Ask]) -> None:
        """What the other one reads."""
        if isinstance(self.found, Reading):
            self.found.read(asks)

    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        """One for each."""
        chains = self.found.draft(asks)
        return [
            _Tree(self.recycled, ask, chain, self.found.classes).grown()
            for ask, chain in zip(asks, chains, strict=True)
        ]


class _Tree:
    """It grows where it is likeliest to be right."""

    def __init__(self, recycled: Recycled, ask: Ask, chain: Draft, first: int) -> None:
        """`first`: the class of what was thought the likeliest."""
        self.recycled, self.ask, self.chain, self.first = recycled, ask, chain, first
        self.tenant = ask.sequence.request.tenant
        self.made, self.depths = Draft(), list[int]()
        self.known: dict[tuple[int, int], int] = {}
        self.twigs: list[Twig] = []

    def grown(self) -> Draft:
        """As many drafts as are asked for, if there are so many."""
        if self.ask.count:
            self._found(1.0, -1, 0)
            self._thought(1.0, -1, self.ask.sequence.tokens[-1])
        while self.twigs and len(self.made.tokens) < self.ask.nodes:
            self._take(heapq.heappop(self.twigs))
        return self.made

    def _take(self, twig: Twig) -> None:
        cost, _, parent, token, sureness, place = twig
        at = self.known.get((parent, token))
        if at is None:
            at = self.known[parent, token] = len(self.made.tokens)
            self.made.tokens.append(token)
            self.made.sureness.append(sureness)
            self.made.parents.append(parent)
            self.depths.append(self.depths[parent] + 1 if parent >= 0 else 1)
            if self.depths[at] < self.ask.count:
                self._thought(-cost, at, token)
        if place >= 0:
            self._found(-cost, at, place + 1)

    def _found(self, chance: float, parent: int, place: int) -> None:
        """What comes next of what was found."""
        if place < len(self.chain.tokens):
            self._push(chance * FOUND, parent, self.chain.tokens[place], self.chain.sureness[place], place)

    def _thought(self, chance: float, parent: int, token: int) -> None:
        """What may follow a token."""
        for rank, (thought, share) in enumerate(zip(self.recycled.after(self.tenant, token), THOUGHT, strict=False)):
            self._push(chance * share, parent, thought, self.first + rank)

    def _push(self, chance: float, parent: int, token: int, sureness: int, place: int = -1) -> None:
        heapq.heappush(self.twigs, (-chance, len(self.twigs), parent, token, sureness, place))
