"""The law of what speculation makes, worked out exactly on a toy model by the engine's own way of choosing.

Each place of an answer is drawn by a number of its own, so that a text is a function of as many numbers in [0, 1).
Their pieces, on which it is one text, are found by halving, and their lengths multiplied: what is made with probability
so and so, without a single draw. It is to be the model's law, whatever is drafted (Leviathan et al., arXiv:2211.17192,
say it of another rule; here a draft is kept where it is what is chosen).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
from numpy.typing import NDArray

from llmkit.inference.place import Place
from llmkit.inference.request import Request, RequestError
from llmkit.inference.runner import Rows
from llmkit.inference.sampler import choose
from llmkit.inference.sampling import Sampling
from llmkit.inference.sequence import Sequence as Text
from llmkit.inference.shortlist import weighed
from llmkit.inference.steer import Rules, Steer

WORDS, PROMPT, LENGTH = 5, (0, 3), 3
GRID, FINEST = 40, 1e-13
"""Numbers between which an end of a piece is looked for, and how near it is brought."""
Law = dict[tuple[int, ...], float]
Drafts = Callable[[Sequence[int], Sequence[float]], list[int]]
"""(text so far, the numbers of the places to come) -> drafts."""


class Toy:
    """A model of a few words whose laws are drawn once."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def logits(self, text: Sequence[int]) -> NDArray[np.float32]:
        """(V,): after a text; what it depends on is all of it."""
        drawn = np.random.default_rng([self.seed, len(text), *text])
        return drawn.normal(0, 1.5, WORDS).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """One way of choosing, and who drafts."""

    name: str
    sampling: Sampling
    drafts: Drafts


def target(toy: Toy, sampling: Sampling) -> Law:
    """The law of texts of `LENGTH` tokens, token by token."""
    law: Law = {}
    for text in product(range(WORDS), repeat=LENGTH):
        chance, steer = 1.0, _steer(sampling)
        for token in text:
            row = steer.law(toy.logits([*PROMPT, *steer.made]))
            kept, weights = weighed(row, sampling)
            ids = np.arange(WORDS) if kept is None else kept
            share = np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64)
            chance *= float(share[ids == token].sum())
            steer.take(token)
        law[text] = chance
    return law


def speculated(toy: Toy, case: Case) -> Law:
    """The law of what comes of steps with drafts."""
    law: Law = {}

    def spread(numbers: tuple[float, ...], share: float) -> None:
        at = len(numbers)
        if at == LENGTH:
            text = made(toy, case, numbers)
            law[text] = law.get(text, 0.0) + share
            return
        rest = (0.5,) * (LENGTH - at - 1)
        for low, high in pieces(lambda number: made(toy, case, (*numbers, number, *rest))[: at + 1]):
            spread((*numbers, (low + high) / 2), share * (high - low))

    spread((), 1.0)
    return law


def made(toy: Toy, case: Case, numbers: Sequence[float]) -> tuple[int, ...]:
    """The text that these numbers draw, by as many steps as it takes."""
    request = Request("", PROMPT, case.sampling)
    one, steer = Text(request, 0, [*PROMPT]), _steer(case.sampling)
    while one.made < LENGTH:
        drafts = case.drafts(one.tokens, numbers[one.made :])[: LENGTH - one.made - 1]
        texts = [[*one.tokens, *drafts[:count]] for count in range(len(drafts) + 1)]
        rows = torch.from_numpy(np.stack([toy.logits(text) for text in texts]))
        place = Place(one, Rows(lambda hidden: hidden, rows, rows), drafts)
        while True:
            token = choose([place.logits], [steer], lambda seed, index, at: numbers[at])[0]
            if isinstance(token, RequestError):
                raise token
            one.tokens.append(token.id)
            steer.take(token.id)
            if not place.take(token):
                break
    return tuple(one.said[:LENGTH])


def pieces(of: Callable[[float], object]) -> list[tuple[float, float]]:
    """The pieces of [0, 1) on which a function is one value, so far as a grid tells them apart."""
    ends = [0.0]
    places = [at / GRID for at in range(GRID)]
    known = [of(place) for place in places]
    last = of(1 - FINEST)
    for at in range(GRID):
        low, high = places[at], places[at + 1] if at + 1 < GRID else 1 - FINEST
        _cut(of, low, known[at], high, known[at + 1] if at + 1 < GRID else last, ends)
    ends.append(1.0)
    return [(low, high) for low, high in pairwise(ends) if high > low]


def _cut(
    of: Callable[[float], object], low: float, left: object, high: float, right: object, ends: list[float]
) -> None:
    if left == right:
        return
    if high - low <= FINEST:
        ends.append(high)
        return
    middle = (low + high) / 2
    here = of(middle)
    _cut(of, low, left, middle, here, ends)
    _cut(of, middle, here, high, right, ends)


def _steer(sampling: Sampling) -> Steer:
    return Steer(Rules(Request("", PROMPT, sampling), ()), [])
