"""The law of what speculation makes, worked out exactly on a toy model.

Each place of an answer is drawn by a number of its own, so that a text is a function of as many numbers in [0, 1).
Their pieces, on which it is one text, are found by halving, and their lengths multiplied: what is made with probability
so and so, without a single draw. It is to be the model's law, whatever is drafted. Any other rule of looking at drafts
is such a function too, of more numbers: that of Leviathan et al. (arXiv:2211.17192) passes, and each of its known
defects is refused (tests/inference/test_speculation_certificate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llmkit.inference.speculation.toy import Law, Numbers, Run

GRID, FINEST = 20, 1e-12
"""Numbers between which an end of a piece is looked for, and how near it is brought."""


Ends = dict[tuple[object, ...], list[float]]
"""After what was decided, where pieces were found to end: looked at first where they are looked for again."""


def law_of(run: Callable[[Numbers], Run], count: int, ends: Ends | None = None) -> Law:
    """The law of the texts that `run` makes of `count` numbers; `ends` of another with the same law make it sooner.

    Under () is the mass on which what a number decides hangs on a later one: of a rule that is right there is none.
    """
    law: Law = {}
    for share, found in leaves(run, count, ends):
        text = found.text if found is not None else ()
        law[text] = law.get(text, 0.0) + share
    return law


def leaves(run: Callable[[Numbers], Run], count: int, ends: Ends | None = None) -> Iterator[tuple[float, Run | None]]:
    """The boxes of numbers on which all is one, and what comes there; None where it hangs on a later number."""
    known: Ends = {} if ends is None else ends

    def spread(
        numbers: tuple[float, ...], share: float, decided: tuple[object, ...]
    ) -> Iterator[tuple[float, Run | None]]:
        at = len(numbers)
        if at == count:
            found = run(numbers)
            yield share, found if found.decided[:count] == decided else None
            return
        rest = (0.5,) * (count - at - 1)
        parts = pieces(lambda number: run((*numbers, number, *rest)).decided[: at + 1], known.get(decided, ()))
        known.setdefault(decided, [low for low, _, _ in parts])
        for low, high, value in parts:
            if value[:at] != decided:
                yield share * (high - low), None
            else:
                yield from spread((*numbers, (low + high) / 2), share * (high - low), value)

    return spread((), 1.0, ())


def apart(ours: Law, theirs: Law) -> float:
    """The largest difference of a text's probability."""
    return max(abs(ours.get(text, 0.0) - theirs.get(text, 0.0)) for text in ours.keys() | theirs.keys())


def overlap(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """How often draws from two laws (V,) by one number agree: the sum of what their intervals of [0, 1) share. It is at
    most sum min(p, q), which no way of drafting exceeds (Leviathan et al.)."""
    ends = [np.concatenate([[0.0], np.cumsum(law)]) for law in (p, q)]
    low, high = np.maximum(ends[0][:-1], ends[1][:-1]), np.minimum(ends[0][1:], ends[1][1:])
    return float(np.maximum(0.0, high - low).sum())


def likely(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """sum min(p, q)."""
    return float(np.minimum(p, q).sum())


Pieces = list[tuple[float, float, tuple[object, ...]]]


def pieces(of: Callable[[float], tuple[object, ...]], known: Sequence[float] = ()) -> Pieces:
    """The pieces of [0, 1) on which a function is one value, so far as a grid tells them apart, and that value; they
    may well begin at those that are `known`."""
    places = [*(at / GRID for at in range(GRID)), 1 - FINEST]
    values = [of(place) for place in places]
    starts: list[tuple[float, tuple[object, ...]]] = [(0.0, values[0])]
    for (low, left), (high, right) in pairwise(zip(places, values, strict=True)):
        _cut(of, (low, left), (high, right), [at for at in known if low < at < high], starts)
    return [(low, high, value) for (low, value), (high, _) in pairwise([*starts, (1.0, ())]) if high > low]


def _cut(
    of: Callable[[float], tuple[object, ...]],
    left: tuple[float, tuple[object, ...]],
    right: tuple[float, tuple[object, ...]],
    known: Sequence[float],
    starts: list[tuple[float, tuple[object, ...]]],
) -> None:
    """Notes where between two places the value becomes another."""
    low, high = left[0], right[0]
    if left[1] == right[1]:
        return
    if high - low <= FINEST:
        starts.append(right)
        return
    between = [known[0] - FINEST, known[0]] if known else [(low + high) / 2]
    places = [left, *((at, of(at)) for at in between if low < at), right]
    for one, next in pairwise(places):
        _cut(of, one, next, known[1:] if next is right else (), starts)
