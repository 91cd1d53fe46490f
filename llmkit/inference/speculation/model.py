"""Drafts by a model: a smaller one of the same vocabulary, or the first layers of the model itself.

It drafts what it would say itself in the place, by the request's own penalties, bounds and grammar and with the number
that the place is drawn by, so that a draft is the more often right the nearer its laws are to the model's: for drawn
tokens both go by one number, as in a coupling (Daliri, Musco and Suresh, arXiv:2408.07978). Beside each it drafts the
likeliest others of the place, which take no forward of its own: a chain with leaves.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from llmkit.core.types import Paged, Span
from llmkit.inference.ranks import Store
from llmkit.inference.request import RequestError, Token
from llmkit.inference.runner import Forward
from llmkit.inference.sampler import with_laws
from llmkit.inference.shortlist import Row, largest, tempered, total
from llmkit.inference.speculation.drafter import Ask, Draft
from llmkit.inference.speculation.room import Room
from llmkit.inference.steer import Steer

READ = 512
"""Tokens of prompts that the drafter reads between two steps: a long one is drafted for a few steps later."""
FEW = 8
"""Tokens that are read with the newest one, in drafting: a step with drafts leaves some."""
CLASSES = 10
"""Of what it would say itself; those of the others beside it come after, by half as wide shares."""


@dataclass(eq=False)
class Held:
    """What the drafter's cache has of one sequence."""

    blocks: list[int] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    """The tokens whose keys and values are there."""
    sure: int = 0
    """How many of them are known to be those of the text, which only grows."""
    turn: int = 0
    """When it was last drafted for."""

    def clear(self) -> None:
        """Nothing of it is there any longer."""
        self.fed, self.sure = [], 0


@dataclass(eq=False)
class Open:
    """A draft in the making."""

    ask: Ask
    held: Held
    steer: Steer | None
    """None where a request's own functions choose: they are asked nothing that may not come."""
    feed: list[int]
    made: Draft = field(default_factory=Draft)
    depth: int = 0
    """Drafts one after the other."""
    last: int = -1
    """Which of the drafts is the newest of them."""

    @property
    def going(self) -> bool:
        """Whether one more is wanted."""
        return self.depth < self.ask.count and len(self.made.tokens) < self.ask.nodes

    @property
    def draft(self) -> Draft:
        """What was made; a chain has no parents."""
        chain = self.depth == len(self.made.tokens)
        return Draft(self.made.tokens, self.made.sureness) if chain else self.made

    def add(self, token: int, sureness: int) -> None:
        """One more after the newest."""
        self.made.tokens.append(token)
        self.made.sureness.append(sureness)
        self.made.parents.append(self.last)


class Small:
    """A `Drafter` by a model with a cache of its own."""

    classes, free = 2 * CLASSES, False

    def __init__(self, forward: Forward, store: Store, words: int, longest: int, width: int = 1) -> None:
        """`words`: of its vocabulary; `longest`: the sequences that it takes; `width`: drafts of one place."""
        self.forward, self.store, self.words, self.longest, self.width = forward, store, words, longest, width
        self.room = Room(store.blocks, store.size, Held)

    @torch.no_grad()
    def read(self, asks: Seq[Ask]) -> None:
        """Prompts up to their newest tokens, the shortest first; of long ones a part."""
        self.room.turn += 1
        asked = [(ask, self._held(ask)) for ask in asks]
        found = [Open(ask, held[0], None, held[1]) for ask, held in asked if held is not None]
        left, part = READ, list[Open]()
        for one in sorted(found, key=lambda one: len(one.feed)):
            some = min(left, len(one.feed) - 1)
            if len(one.feed) > FEW and some and self._room(one, some):
                one.feed = one.feed[:some]
                left -= some
                part.append(one)
        if part:
            self._hidden(part)

    @torch.no_grad()
    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        """One for each that is read."""
        self.room.turn += 1
        opened = [self._opened(ask) for ask in asks]
        going = [one for one in opened if one is not None and self._room(one, len(one.feed))]
        while going:
            self._token(going)
            going = [one for one in going if one.going and self._room(one, 1)]
        return [Draft() if one is None else one.draft for one in opened]

    def _opened(self, ask: Ask) -> Open | None:
        """Where the draft of a sequence begins; nothing for one that it does not take, or has not read yet."""
        found = self._held(ask)
        if found is None or len(found[1]) > FEW:
            return None
        steer = None if ask.steer.rules.processors else ask.steer.fork(ask.steer.index)
        return Open(ask, found[0], steer, found[1])

    def _held(self, ask: Ask) -> tuple[Held, list[int]] | None:
        """What is there of a sequence, and its tokens after that; nothing for one that it does not take."""
        one, count = ask.sequence, len(ask.sequence.tokens) - ask.sequence.before
        if not ask.count or count + ask.count > self.longest:
            return None
        held = self.room.of(one)
        held.turn = self.room.turn
        news, known = zip(held.fed[held.sure :], one.tokens[one.before + held.sure :], strict=False), len(held.fed)
        same = next((at for at, (a, b) in enumerate(news, held.sure) if a != b), known)
        held.sure = min(same, count - 1)
        del held.fed[held.sure :]
        feed = one.tokens[one.before + held.sure :]
        return None if max(feed) >= self.words else (held, feed)

    def _room(self, one: Open, count: int) -> bool:
        """Whether there are blocks for so many tokens more."""
        return self.room.reserve(one.held, len(one.held.fed) + count)

    def _token(self, going: list[Open]) -> None:
        """One more of each."""
        hidden = self._hidden(going)
        rows = self.forward.logits(hidden).cpu().numpy()
        steered = [(row, one.steer) for row, one in zip(rows, going, strict=True) if one.steer is not None]
        chosen = iter(with_laws([row for row, _ in steered], [steer for _, steer in steered]))
        for row, one in zip(rows, going, strict=True):
            found = next(chosen) if one.steer is not None else (Token(int(row.argmax()), None, 0.0), row)
            if isinstance(found, RequestError) or found[0].id >= self.words:
                one.ask = replace(one.ask, count=0)
            else:
                self._take(one, *found)

    def _take(self, one: Open, token: Token, law: Row) -> None:
        """What it says and what, by this law, it might say; nothing follows the end of a text."""
        weights = tempered(law, one.ask.steer.rules.sampling.temperature or 1.0)
        mass, at = total(weights), len(one.made.tokens)
        if not np.isfinite(mass):  # its own numbers overflow
            one.ask = replace(one.ask, count=0)
            return
        one.add(token.id, min(CLASSES - 1, int(weights[token.id] / mass * CLASSES)))
        for other in self._others(law, token.id, one):
            one.add(other, CLASSES + min(CLASSES - 1, int(2 * weights[other] / mass * CLASSES)))
        one.last, one.depth, one.feed = at, one.depth + 1, [token.id]
        if token.id in one.ask.steer.rules.ends:
            one.ask = replace(one.ask, count=0)
        elif one.steer is not None:
            one.steer.take(token.id)

    def _others(self, law: Row, chosen: int, one: Open) -> list[int]:
        """The likeliest but the one that is drafted, and but those that would end the text."""
        count = min(self.width - 1, one.ask.nodes - len(one.made.tokens))
        if count <= 0:
            return []
        some = largest(law, min(self.width, len(law)))
        likely = some[np.argsort(-law[some], kind="stable")]
        able = (int(at) for at in likely if at not in (chosen, *one.ask.steer.rules.ends) and at < self.words)
        return [at for at in able if np.isfinite(law[at])][:count]

    def _hidden(self, opened: list[Open]) -> Tensor:
        """Last hidden states (len(opened), H), after all that each feeds."""
        tokens: list[int] = []
        places: list[int] = []
        spans: list[Span] = []
        for one in opened:
            past, start = len(one.held.fed), len(tokens)
            tokens += one.feed
            places += range(past, past + len(one.feed))
            spans.append(Span(0, start, len(tokens), past, tuple(one.held.blocks)))
        there, at = torch.tensor([tokens, places]).to(self.forward.device)
        hidden = self.forward.hidden(there, at, Paged(self.store, tuple(spans)), [""] * len(spans))
        for one in opened:
            one.held.fed += one.feed
        return hidden[torch.tensor([span.end - 1 for span in spans], device=hidden.device)]
