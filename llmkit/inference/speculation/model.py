"""Drafts by a model: a smaller one of the same vocabulary, or the first layers of the model itself.

It drafts what it would say itself in the place, by the request's own penalties, bounds and grammar and with the number
that the place is drawn by, so that a draft is the more often right the nearer its laws are to the model's: for drawn
tokens both go by one number, as in a coupling (Daliri, Musco and Suresh, arXiv:2408.07978).
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
from llmkit.inference.sampler import choose
from llmkit.inference.speculation.drafter import Ask, Draft
from llmkit.inference.speculation.room import Room
from llmkit.inference.steer import Steer

READ = 512
"""Tokens of prompts that the drafter reads between two steps: a long one is drafted for a few steps later."""
CLASSES = 10


@dataclass(eq=False)
class Held:
    """What the drafter's cache has of one sequence."""

    blocks: list[int] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    """The tokens whose keys and values are there."""
    turn: int = 0
    """When it was last drafted for."""

    def clear(self) -> None:
        """Nothing of it is there any longer."""
        self.fed = []


@dataclass(eq=False)
class Open:
    """A draft in the making."""

    ask: Ask
    held: Held
    steer: Steer | None
    """None where a request's own functions choose: they are asked nothing that may not come."""
    feed: list[int]
    made: Draft = field(default_factory=Draft)

    @property
    def going(self) -> bool:
        """Whether one more is wanted."""
        return len(self.made.tokens) < self.ask.count


class Small:
    """A `Drafter` by a model with a cache of its own."""

    classes, free = CLASSES, False

    def __init__(self, forward: Forward, store: Store, words: int, longest: int) -> None:
        """`words`: of its vocabulary; `longest`: the sequences that it takes."""
        self.forward, self.store, self.words, self.longest = forward, store, words, longest
        self.room = Room(store.blocks, store.size, Held)

    @torch.no_grad()
    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        """One for each."""
        self.room.turn += 1
        opened = [self._opened(ask) for ask in asks]
        going = self._ready([one for one in opened if one is not None])
        while going:
            self._token(going)
            going = [one for one in going if one.going and self._room(one, 1)]
        return [Draft() if one is None else one.made for one in opened]

    def _opened(self, ask: Ask) -> Open | None:
        """Where the draft of a sequence begins; nothing for one that it does not take."""
        one = ask.sequence
        text = one.tokens[one.before :]
        if not ask.count or len(text) + ask.count > self.longest or max(text) >= self.words:
            return None
        held = self.room.of(one)
        held.turn = self.room.turn
        same = next((at for at, (a, b) in enumerate(zip(held.fed, text, strict=False)) if a != b), len(held.fed))
        del held.fed[min(same, len(text) - 1) :]
        steer = None if ask.steer.rules.processors else ask.steer.fork(ask.steer.index)
        return Open(ask, held, steer, text[len(held.fed) :])

    def _ready(self, opened: list[Open]) -> list[Open]:
        """Those that are read up to their last token; of long prompts a part is read."""
        left, ready, part = READ, [], []
        for one in sorted(opened, key=lambda one: len(one.feed)):
            if len(one.feed) <= left and self._room(one, len(one.feed)):
                left -= len(one.feed)
                ready.append(one)
            elif (some := min(left, len(one.feed) - 1)) and self._room(one, some):
                one.feed = one.feed[:some]
                left -= some
                part.append(one)
        if part:
            self._hidden(part)
        return ready

    def _room(self, one: Open, count: int) -> bool:
        """Whether there are blocks for so many tokens more."""
        return self.room.reserve(one.held, len(one.held.fed) + count)

    def _token(self, going: list[Open]) -> None:
        """One more of each."""
        hidden = self._hidden(going)
        logits = self.forward.logits(hidden)
        steered = [(row, one.steer) for row, one in zip(logits, going, strict=True) if one.steer is not None]
        chosen = iter(choose([row for row, _ in steered], [steer for _, steer in steered]))
        for row, one in zip(logits, going, strict=True):
            token = next(chosen) if one.steer is not None else Token(int(row.argmax()), None, 0.0)
            if isinstance(token, RequestError) or token.id in one.ask.steer.rules.ends:
                self._end(one, token)
                continue
            self._take(one, token, row)

    def _end(self, one: Open, token: Token | RequestError) -> None:
        """Nothing is drafted after the end of a text."""
        if isinstance(token, Token):
            one.made.tokens.append(token.id)
            one.made.sureness.append(CLASSES // 2)
        one.ask = replace(one.ask, count=0)

    def _take(self, one: Open, token: Token, row: Tensor) -> None:
        one.made.tokens.append(token.id)
        one.made.sureness.append(_sureness(row, token))
        one.feed = [token.id]
        if one.steer is not None:
            one.steer.take(token.id)

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
            one.held.fed += one.feed
        there, at = torch.tensor([tokens, places]).to(self.forward.device)
        hidden = self.forward.hidden(there, at, Paged(self.store, tuple(spans)), [""] * len(spans))
        return hidden[torch.tensor([span.end - 1 for span in spans], device=hidden.device)]


def _sureness(row: Tensor, token: Token) -> int:
    """By the tenth of its probability."""
    if token.sampling_logprob:
        share = float(np.exp(token.sampling_logprob))
    else:
        law = row.float().cpu().numpy()
        share = 1 / float(np.exp(law - law.max()).sum())
    return min(CLASSES - 1, int(share * CLASSES))
