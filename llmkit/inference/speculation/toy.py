"""A model of five words, and the engine's own way of choosing on it as a function of the numbers that it draws by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.inference.place import Place
from llmkit.inference.request import Request, RequestError, Token
from llmkit.inference.runner import Rows
from llmkit.inference.sampler import choose
from llmkit.inference.sampling import Sampling
from llmkit.inference.sequence import Sequence as Text
from llmkit.inference.shortlist import drawn, weighed
from llmkit.inference.steer import Rules, Steer

WORDS, PROMPT, LENGTH = 5, (0, 3), 3
Law = dict[tuple[int, ...], float]
"""The probability of each text."""
Numbers = Sequence[float]
"""What places are drawn by, each in [0, 1)."""
Choose = Callable[[Tensor, Steer, float], int]
"""(logits (V,), what moves them, the place's number) -> the token."""


class Run(NamedTuple):
    """What came of some numbers."""

    text: tuple[int, ...]
    decided: tuple[object, ...]
    """By each number."""
    kept: tuple[bool, ...] = ()
    """Of each place whether it was drafted right; a place for which nothing was drafted was not."""


@dataclass
class Toy:
    """A model whose laws are drawn once."""

    seed: int
    known: dict[tuple[int, ...], NDArray[np.float32]] = field(default_factory=dict)

    def logits(self, text: Sequence[int]) -> NDArray[np.float32]:
        """(V,): after a text; what it depends on is all of it."""
        name = tuple(text)
        if name not in self.known:
            drawn_ = np.random.default_rng([self.seed, len(name), *name])
            self.known[name] = drawn_.normal(0, 1.5, WORDS).astype(np.float32)
        return self.known[name]


@dataclass(frozen=True)
class Case:
    """One way of choosing, and who drafts."""

    name: str
    sampling: Sampling
    drafts: Callable[[Sequence[int], Numbers], list[int]]
    """(text so far, the numbers of the places to come) -> drafts."""


def installed(row: Tensor, steer: Steer, number: float) -> int:
    """The engine's sampler as it runs here, compiled or not, in fp32.

    Raises:
        RequestError: nothing can be chosen.
    """
    token = choose([row], [steer], lambda seed, index, at: number)[0]
    if isinstance(token, RequestError):
        raise token
    return token.id


def plainly(row: Tensor, steer: Steer, number: float) -> int:
    """The same in numpy with sums in fp64: what the compiled sampler is tested against."""
    law = steer.law(row.numpy())
    if steer.rules.sampling.temperature == 0:
        return int(law.argmax())
    kept, weights = weighed(law, steer.rules.sampling)
    place, _ = drawn(weights, number)
    return place if kept is None else int(kept[place])


def steered(sampling: Sampling) -> Steer:
    """What moves the logits of the toy's texts."""
    return Steer(Rules(Request("", PROMPT, sampling), ()), [])


def shares(toy: Toy, steer: Steer) -> NDArray[np.float64]:
    """(V,): the law of the toy's next token, in closed form."""
    return closed(steer.law(toy.logits([*PROMPT, *steer.made])), steer.rules.sampling)


def closed(row: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """(V,): the law that is drawn from, of logits (V,) that nothing moves any more."""
    made = np.zeros(len(row))
    if sampling.temperature == 0:
        made[int(row.argmax())] = 1
        return made
    kept, weights = weighed(row, sampling)
    made[np.arange(len(row)) if kept is None else kept] = weights
    law: NDArray[np.float64] = made / made.sum()
    return law


def target(toy: Toy, sampling: Sampling, length: int = LENGTH) -> Law:
    """The law of texts, multiplied out token by token in fp64."""
    law: Law = {}
    for text in product(range(WORDS), repeat=length):
        chance, steer = 1.0, steered(sampling)
        for token in text:
            chance *= float(shares(toy, steer)[token])
            steer.take(token)
        law[text] = chance
    return law


def made(toy: Toy, case: Case, numbers: Numbers, choose: Choose = installed) -> Run:
    """The text that these numbers draw, by as many steps as it takes, drafts looked at as the engine looks at them."""
    one, steer = Text(Request("", PROMPT, case.sampling), 0, [*PROMPT]), steered(case.sampling)
    kept: list[bool] = []
    while one.made < len(numbers):
        drafts = case.drafts(one.tokens, numbers[one.made :])[: len(numbers) - one.made - 1]
        texts = [[*one.tokens, *drafts[:count]] for count in range(len(drafts) + 1)]
        rows = torch.from_numpy(np.stack([toy.logits(text) for text in texts]))
        place = Place(one, Rows(lambda hidden: hidden, rows, rows), drafts)
        while True:
            token = choose(place.logits, steer, numbers[one.made])
            one.tokens.append(token)
            steer.take(token)
            kept.append(place.take(Token(token, None, None)))
            if not kept[-1]:
                break
    text = tuple(one.said)
    return Run(text, text, tuple(kept))
