"""One that drafts, how often it is right and how long it takes: when it is asked, and for how much."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Seq
from dataclasses import replace
from weakref import WeakSet

from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.costs import Costs
from llmkit.inference.speculation.drafter import Ask, Draft, Drafter, Reading
from llmkit.inference.speculation.rates import Rates
from llmkit.inference.speculation.tree import check, depth

PROBE, PROBED = 32, 2
"""Steps after which a drafter that is not worth its time is tried again, and by how many drafts."""
SHARE, SELDOM = 0.01, 32
"""Of a step, that one may take whose drafts are worth less than its time lately; and steps after which it is asked."""
FRESH = 0.1
"""The share of a new step in what drafts were worth lately."""


class Source:
    """A drafter, and what is known of it."""

    def __init__(self, drafter: Drafter, most: int, name: str = "", words: int | None = None) -> None:
        """`most`: drafts of one sequence one after another; `name`: how it is called where it fails; `words`: of the
        vocabulary, None where nobody knows how many."""
        self.drafter, self.most, self.name = drafter, most, name or type(drafter).__name__
        self.words = words
        self.rates, self.drafting = Rates(drafter.classes), Costs()
        """How often it is right; how long one level of all drafts takes (of one that is free: asking it), by how many
        sequences have one."""
        self.reading = drafter if isinstance(drafter, Reading) else None
        self.reads, self.read = Costs(), WeakSet[Sequence]()
        """How long it takes to read what a step made, and of whom that was read the last time."""
        self.skipped = 0
        """Steps since it was last worth drafting."""
        self.gain, self.rested = 1.0, 0
        """Of one that is free: by how much, as a share, its drafts let more tokens a second expect, lately; and steps
        since it was asked."""

    def drafts(self, asks: Seq[Ask], speed: float | None, costs: Costs, beside: int) -> list[Draft]:
        """Of those that take time as much as makes more than `speed` tokens a second, and now and then some all the
        same: what is not tried is not learned of; all without a speed. `costs`: of a step; `beside`: tokens of prompts
        that it is to hold."""
        for ask in asks:
            self.rates.learn(ask.sequence)
        asks = [replace(ask, count=min(ask.count, self.most)) for ask in asks]
        count = None if self.drafter.free or speed is None else self._wanted(asks, speed, costs, beside)
        if count is not None:
            asks = [replace(ask, count=min(ask.count, count)) for ask in asks]
        made = self._timed(asks) if count != 0 else [Draft() for _ in asks]
        for ask, draft in zip(asks, made, strict=True):
            self.rates.note(ask.sequence, draft)
        return made

    def rests(self, sequences: int, step: float) -> bool:
        """Whether one that is free is left out of a step of so many sequences that takes so long: it is asked always
        where its drafts are worth its time, and else so seldom that it takes no more than `SHARE`."""
        if not self.drafter.free:
            return False
        share = self.drafting.of(sequences) / max(step, 1e-9)
        every = 1 if share <= max(self.gain, SHARE) else min(SELDOM, math.ceil(share / SHARE))
        self.rested = (self.rested + 1) % every
        return self.rested > 0

    def gave(self, gain: float) -> None:
        """It was asked, and its drafts let so much more expect."""
        if self.drafter.free:
            self.gain += FRESH * (max(0.0, gain) - self.gain)

    def chances(self, one: Sequence, draft: Draft) -> list[float]:
        """Of each draft, that it and all before it are right."""
        return self.rates.chances(one, draft)

    def _wanted(self, asks: Seq[Ask], speed: float, costs: Costs, beside: int) -> int:
        chances = [self.rates.ahead(ask.sequence, ask.count) for ask in asks]
        rows, made, best, wanted = beside + len(asks), float(len(asks)), speed, 0
        deepest = max(ask.count for ask in asks)
        for at in range(deepest):
            more = [each[at] for each in chances if at < len(each)]
            made, rows = made + sum(more), rows + len(more)
            drafting = self.reads.of(len(asks)) + self.drafting.of(len(asks)) * (at + 1)
            reached = made / max(costs.of(rows) + drafting, 1e-9)
            if reached > best:
                best, wanted = reached, at + 1
        self.skipped = 0 if wanted else self.skipped + 1
        if not wanted and self.skipped % PROBE == 0:
            return min(deepest, PROBED)
        return wanted

    def _timed(self, asks: Seq[Ask]) -> list[Draft]:
        if self.reading is not None:
            self._read(self.reading, asks)
        began = time.perf_counter()
        drafts = self.drafter.draft(asks)
        took = time.perf_counter() - began
        for draft in drafts:
            check(draft, self.drafter.classes, self.words)
        if longest := 1 if self.drafter.free else max(map(depth, drafts)):
            self.drafting.see(len(asks), took / longest)
        return drafts

    def _read(self, reading: Reading, asks: Seq[Ask]) -> None:
        """What a step made is read; how long that takes is learned where all were read before: a prompt takes longer,
        and is read once."""
        steady = all(ask.sequence in self.read for ask in asks)
        self.read = WeakSet(ask.sequence for ask in asks)
        began = time.perf_counter()
        reading.read(asks)
        if steady:
            self.reads.see(len(asks), time.perf_counter() - began)
