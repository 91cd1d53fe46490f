"""How much is drafted in a step: as much as makes more tokens in a second, by what was measured so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace

from llmkit.inference.runner import Rows
from llmkit.inference.scheduler import Chunk
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.costs import Costs
from llmkit.inference.speculation.drafter import Ask, Draft, Drafter, Watching
from llmkit.inference.speculation.rates import Rates
from llmkit.inference.speculation.tree import by_chance, likeliest, taken
from llmkit.inference.steer import Steer

MARGIN = 1.02
"""A gain that is foretold by less is none: what is measured is never quite what it was."""
PROBE, PROBED = 32, 2
"""Steps after which a drafter that is not worth its time is tried again, and by how many drafts."""


class Speculator:
    """Gives sequences their drafts before a step is planned."""

    def __init__(self, drafter: Drafter, most: int, fixed: bool = False) -> None:
        """`most`: drafts of one sequence in a step; `fixed`: as many always, whatever they cost."""
        self.drafter, self.most, self.fixed = drafter, most, fixed
        self.costs, self.drafting, self.rates = Costs(), Costs(), Rates(drafter.classes)
        """Of a step by its tokens; of one token of all drafts by how many sequences have one; and what is right."""
        self.watching = drafter if isinstance(drafter, Watching) else None
        self.skipped = 0
        """Steps since it was last worth drafting."""

    def propose(
        self,
        running: Iterable[Sequence],
        steer: Callable[[Sequence], Steer],
        room: int,
        beside: int,
        trees: bool = False,
    ) -> None:
        """Drafts for those of `running` that make their next token: so many at most that the step has `room` for;
        `beside`: tokens of prompts that it is to hold; `trees`: whether they may branch."""
        able = [one for one in running if one.waiting == 1 and not one.rests and one.made > 0]
        if not able:
            return
        for one in able:
            self.rates.learn(one)
        drafts = self._drafts([Ask(one, min(self.most, _left(one)), steer(one)) for one in able], beside)
        for one, draft in zip(able, drafts, strict=True):
            self.rates.note(one, draft)
        drafts = [
            self._shaped(one, draft, trees) if draft.parents else draft for one, draft in zip(able, drafts, strict=True)
        ]
        for one, draft, count in zip(able, drafts, self._lengths(able, drafts, room, beside), strict=True):
            made = taken(draft, count) if draft.parents else draft
            one.drafts, one.parents = made.tokens[:count], made.parents

    def _shaped(self, one: Sequence, draft: Draft, trees: bool) -> Draft:
        """A tree whose likeliest drafts come first, or a chain of it."""
        chances = self.rates.chances(one, draft)
        return by_chance(draft, chances) if trees else likeliest(draft, chances)

    def see(self, chunks: Seq[Chunk], rows: Seq[Rows]) -> None:
        """These were computed in a step, in this order, with these logits; nothing is chosen yet."""
        if self.watching is not None:
            self.watching.see(chunks, rows)

    def _drafts(self, asks: list[Ask], beside: int) -> list[Draft]:
        """Where drafting takes time, as long as those before were worth it; now and then some all the same, since what
        is not tried is not learned of."""
        if self.drafter.free or self.fixed:
            return self.drafter.draft(asks)
        rows, chances = beside + len(asks), [self.rates.ahead(ask.sequence, ask.count) for ask in asks]
        depth = max((ask.count for ask in asks), default=0)
        made = best = float(len(asks))
        best, wanted = made / max(self.costs.of(rows), 1e-9) * MARGIN, 0
        for at in range(depth):
            more = [each[at] for each in chances if at < len(each)]
            made, rows = made + sum(more), rows + len(more)
            speed = made / max(self.costs.of(rows) + self.drafting.of(len(asks)) * (at + 1), 1e-9)
            if speed > best:
                best, wanted = speed, at + 1
        self.skipped = 0 if wanted else self.skipped + 1
        if not wanted and self.skipped % PROBE == 0:
            wanted = min(depth, PROBED)
        if not wanted:
            return [Draft() for _ in asks]
        began = time.perf_counter()
        drafts = self.drafter.draft([replace(ask, count=min(ask.count, wanted)) for ask in asks])
        longest = max(len(draft.tokens) for draft in drafts)
        if longest:
            self.drafting.see(len(asks), (time.perf_counter() - began) / longest)
        return drafts

    def _lengths(self, able: Seq[Sequence], drafts: Seq[Draft], room: int, beside: int) -> list[int]:
        """Of the drafts of all those that are likeliest to be right, as many as are worth their time."""
        chances = [self.rates.chances(one, draft) for one, draft in zip(able, drafts, strict=True)]
        order = sorted(((chance, at) for at, each in enumerate(chances) for chance in each), key=lambda one: -one[0])
        rows, made = beside + len(able), float(len(able))
        order = order[: max(0, room - rows)]
        count = len(order) if self.fixed else self._worth(made, rows, [chance for chance, _ in order])
        lengths = [0] * len(able)
        for _, at in order[:count]:
            lengths[at] += 1
        return lengths

    def _worth(self, made: float, rows: int, chances: Seq[float]) -> int:
        """How many drafts make the most tokens in a second, where `made` come of `rows` without any."""
        best, count = made / max(self.costs.of(rows), 1e-9) * MARGIN, 0
        for number, chance in enumerate(chances, 1):
            made += chance
            speed = made / max(self.costs.of(rows + number), 1e-9)
            if speed > best:
                best, count = speed, number
        return count


def _left(one: Sequence) -> int:
    """Drafts that can still be of use: the last token of an answer is never drafted for."""
    return max(0, one.request.sampling.max_tokens - one.made - 1)
