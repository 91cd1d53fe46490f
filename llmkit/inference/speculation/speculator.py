"""How much is drafted in a step: as much as makes more tokens in a second, by what was measured so far."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

from llmkit.core.errors import LlmkitError, one_line
from llmkit.inference.request import alone
from llmkit.inference.runner import Rows
from llmkit.inference.scheduler import Chunk
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.costs import Costs
from llmkit.inference.speculation.drafter import Ask, Watching
from llmkit.inference.speculation.most import MOST
from llmkit.inference.speculation.source import Source
from llmkit.inference.speculation.tree import Tree, first, joined, laid, likeliest, ordered
from llmkit.inference.steer import Steer

LOG = logging.getLogger("llmkit.inference")
MARGIN = 1.02
"""A gain that is foretold by less is none: what is measured is never quite what it was."""
SPARE, FRESH = 8, 0.1
"""Drafts beyond twice those that are taken, of which a drafter is asked to make so many; and the share of a step in how
many are taken."""


class Speculator:
    """Gives sequences their drafts before a step is planned."""

    def __init__(self, sources: Seq[Source], fixed: bool = False) -> None:
        """`sources`: those that cost next to nothing first; `fixed`: as much as there is always, whatever it costs."""
        self.sources, self.fixed = list(sources), fixed
        self.costs = Costs()
        """Of a step by its tokens."""
        self.taken = float(MOST)
        """Drafts of a sequence that were looked at, in the steps before."""
        self.fallen: list[str] = []
        """Of each that failed and was given up, who it was and of what it failed."""

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
        nodes = MOST if self.fixed else min(MOST, int(2 * self.taken) + SPARE)
        asks = [Ask(one, _left(one), steer(one), nodes) for one in able]
        found = [ordered(tree) if trees else likeliest(tree) for tree in self._trees(asks, beside)]
        found = [_allowed(one, tree) for one, tree in zip(able, found, strict=True)]
        counts = self._lengths(found, room, beside)
        for one, tree, count in zip(able, found, counts, strict=True):
            draft = laid(first(tree, count))
            one.drafts, one.parents = draft.tokens, draft.parents
        self.taken += FRESH * (sum(counts) / len(counts) - self.taken)

    def see(self, chunks: Seq[Chunk], rows: Seq[Rows]) -> None:
        """These were computed in a step, in this order, with these logits; nothing is chosen yet."""
        for source in tuple(self.sources):
            if isinstance(source.drafter, Watching) and not source.rested:
                with self._tried(source):
                    source.drafter.see(chunks, rows)

    def _trees(self, asks: list[Ask], beside: int) -> list[Tree]:
        """What all that draft say together."""
        found, step = [Tree() for _ in asks], self.costs.of(beside + len(asks))
        for source in tuple(self.sources):
            if self.fixed or not source.rests(len(asks), step):
                with self._tried(source):
                    found = self._with(source, found, asks, beside)
        return found

    def _with(self, source: Source, found: Seq[Tree], asks: list[Ask], beside: int) -> list[Tree]:
        """What is found already, with what one more says."""
        speed = None if self.fixed else self._speed(found, beside)
        drafts = source.drafts(asks, speed, self.costs, beside)
        trees = [Tree(draft, source.chances(ask.sequence, draft)) for ask, draft in zip(asks, drafts, strict=True)]
        made = [joined(one, other) for one, other in zip(found, trees, strict=True)]
        if source.drafter.free and speed:
            source.gave(self._speed(made, beside) / speed - 1)
        return made

    @contextmanager
    def _tried(self, source: Source) -> Iterator[None]:
        """One that fails inside, of whatever (no memory too), is given up, and no answer waits for it: drafts change
        nothing of what is said."""
        try:
            with alone("it cannot draft"):
                yield
        except LlmkitError as told:
            self.sources.remove(source)
            cause = told.__cause__ or told
            at = traceback.extract_tb(cause.__traceback__)[-1]
            why = f"{type(cause).__name__} ({at.filename.rsplit('/', 1)[-1]}:{at.lineno}): {cause}"
            self.fallen.append(f"{source.name}: {one_line(why)}")
            LOG.warning("speculation is given up, and answers go on without its drafts: %s", self.fallen[-1])

    def _speed(self, found: Seq[Tree], beside: int) -> float:
        """Tokens a second that are to be had by these."""
        rows, chances = beside + len(found), _chances(found)
        count = self._worth(float(len(found)), rows, chances)
        return (len(found) + sum(chances[:count])) / max(self.costs.of(rows + count), 1e-9) * MARGIN

    def _lengths(self, found: Seq[Tree], room: int, beside: int) -> list[int]:
        """Of the drafts of all those that are likeliest to be right, as many as are worth their time."""
        order = sorted(
            ((chance, at) for at, tree in enumerate(found) for chance in tree.chances), key=lambda one: -one[0]
        )
        rows = beside + len(found)
        order = order[: max(0, room - rows)]
        if not self.fixed:
            order = order[: self._worth(float(len(found)), rows, [chance for chance, _ in order])]
        lengths = [0] * len(found)
        for _, at in order:
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


def _chances(found: Seq[Tree]) -> list[float]:
    return sorted((chance for tree in found for chance in tree.chances), reverse=True)


def _left(one: Sequence) -> int:
    """Drafts one after another that can still be of use, and are not too many for who asked: the last token of an
    answer is never drafted for."""
    asked = one.request.sampling
    left = max(0, asked.max_tokens - one.made - 1)
    return left if asked.drafts is None else min(left, asked.drafts)


def _allowed(one: Sequence, tree: Tree) -> Tree:
    """As many as who asked lets be looked at."""
    most = one.request.sampling.drafts
    return tree if most is None else first(tree, most)
