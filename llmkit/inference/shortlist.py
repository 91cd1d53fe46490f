"""Which tokens can be drawn, how much each weighs, and the draw: on one row of numbers, without a sort of all of them.

A row is worked on alone, so that what comes of it cannot depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llmkit_kernels import draw
from llmkit_kernels.build import lacks
from numpy.typing import NDArray

from llmkit.inference.sampling import Sampling

Row = NDArray[np.float32]
Ids = NDArray[np.int64]
BLOCK = 256
"""Weights that are summed together before the place of a draw is looked for."""
HEAD = 64
"""How many of the likeliest tokens `top_p` looks at before it looks at more."""
SAMPLE, MARGIN = 1024, 96
"""Weights by which `top_p` guesses where the last one lies that it keeps, and how many of them it may be off."""


def draws(asked: Sequence[tuple[Row, Sampling, float]]) -> list[tuple[int, float]]:
    """For each law (V,), how it is drawn from, and its number in [0, 1): the token, and the sum of all weights."""
    if not asked or lacks("draw"):
        return [_draw(*one) for one in asked]
    kept = [_likeliest(law, sampling.top_k) for law, sampling, _ in asked]
    laws = [law if ids is None else law[ids] for ids, (law, _, _) in zip(kept, asked, strict=True)]
    given = [
        draw.Asked(np.ascontiguousarray(law), _sharp(how.temperature), how.top_p, how.min_p, at)
        for law, (_, how, at) in zip(laws, asked, strict=True)
    ]
    found = zip(kept, draw.draw(given), strict=True)
    return [(at if ids is None else int(ids[at]), mass) for ids, (at, mass) in found]


def _draw(law: Row, sampling: Sampling, at: float) -> tuple[int, float]:
    kept, weights = weighed(law, sampling)
    place, mass = drawn(weights, at)
    return place if kept is None else int(kept[place]), mass


def weighed(law: Row, sampling: Sampling) -> tuple[Ids | None, Row]:
    """The tokens that can be drawn, in the order of the vocabulary (None: all), and their weights, the likeliest's 1.

    Of all tokens the `top_k` likeliest, of these the fewest that hold `top_p` of the mass (arXiv:1904.09751), of these
    the ones at least `min_p` as likely as the likeliest (arXiv:2407.01082).
    """
    kept = _likeliest(law, sampling.top_k)
    weights = tempered(law if kept is None else law[kept], sampling.temperature)
    if sampling.top_p < 1:
        kept, weights = _narrowed(kept, weights, nucleus(weights, sampling.top_p))
    if sampling.min_p > 0:
        kept, weights = _narrowed(kept, weights, np.flatnonzero(weights >= np.float32(sampling.min_p)))
    return kept, weights


def _likeliest(law: Row, top_k: int) -> Ids | None:
    return largest(law, top_k) if 0 < top_k < len(law) else None


def _narrowed(kept: Ids | None, weights: Row, at: Ids) -> tuple[Ids, Row]:
    return at if kept is None else kept[at], weights[at]


def tempered(law: Row, temperature: float) -> Row:
    """exp((law - its largest) / temperature): no overflow at any temperature."""
    made: Row = law - law.max()
    with np.errstate(over="ignore"):
        if temperature != 1:
            made *= np.float32(_sharp(temperature))
        np.exp(made, out=made)
    return made


def _sharp(temperature: float) -> float:
    return min(max(1 / temperature, 1e-30), 1e30)


def largest(values: Row, count: int) -> Ids:
    """The places, in order, of the `count` largest values, and of all that equal the last of these."""
    width = len(values) // 64
    if count > width:
        return np.flatnonzero(values >= np.partition(values, -count)[-count])
    columns = values[: width * 64].reshape(64, width).max(0)
    at = np.flatnonzero(values >= np.partition(columns, -count)[-count])  # at least `count` values are as large
    some = values[at]
    found: Ids = at[some >= np.partition(some, -count)[-count]]
    return found


def nucleus(weights: Row, share: float) -> Ids:
    """The places, in order, of the fewest weights that hold `share` of the sum; of equal ones the first."""
    wanted = share * total(weights)
    if len(weights) > HEAD * 8:
        at = largest(weights, HEAD)
        if (found := _holding(weights[at], wanted)) is not None:
            return at[found]
    if len(weights) >= 8 * SAMPLE and (guessed := _guessed(weights, share, wanted)) is not None:
        return guessed
    found = _holding(weights, wanted)
    return np.arange(len(weights)) if found is None else found


def _guessed(weights: Row, share: float, wanted: float) -> Ids | None:
    """The same by sorting those alone that lie about where a sample has its last one; none where that was no guess."""
    sample = np.sort(weights[:: len(weights) // SAMPLE])[::-1]
    mass = np.cumsum(sample, dtype=np.float64)
    guess = int(np.searchsorted(mass, share * mass[-1]))
    high, low = sample[max(0, guess - MARGIN)], sample[min(len(sample) - 1, guess + MARGIN)]
    at = np.flatnonzero(weights >= low)
    some = weights[at]
    near = some[np.flatnonzero(some <= high)]
    above, sure = float(some.sum(dtype=np.float64) - near.sum(dtype=np.float64)), len(some) - len(near)
    if above >= wanted:
        return None
    found = _holding(some, wanted, near, above, sure)
    return None if found is None else at[found]


def _holding(weights: Row, wanted: float, near: Row | None = None, above: float = 0.0, sure: int = 0) -> Ids | None:
    """The places of the fewest weights that hold `wanted`, if all together do. `near`: those to look among, where the
    others, `sure` of them, are larger and hold `above`."""
    falling = np.sort(weights if near is None else near)[::-1]
    mass = above + np.cumsum(falling, dtype=np.float64)
    if not len(mass) or mass[-1] < wanted:
        return None
    last = int(np.searchsorted(mass, wanted))
    least, kept = falling[last], sure + last + 1
    at = np.flatnonzero(weights >= least)
    if len(at) == kept:
        return at
    equal = at[weights[at] == least]
    return np.setdiff1d(at, equal[len(equal) - (len(at) - kept) :], assume_unique=True)


def total(weights: Row) -> float:
    """Their sum: of blocks in fp32, of these in fp64, which takes a fifth of the time that fp64 throughout does."""
    return float(_sums(weights).sum(dtype=np.float64))


def _sums(weights: Row) -> Row:
    """Of each block."""
    whole = len(weights) // BLOCK * BLOCK
    sums: Row = np.einsum("ij->i", weights[:whole].reshape(-1, BLOCK))
    return sums if whole == len(weights) else np.append(sums, weights[whole:].sum())


def drawn(weights: Row, at: float) -> tuple[int, float]:
    """The place whose share of the sum holds `at` (in [0, 1)), counted in order; and the sum."""
    if len(weights) <= 4 * BLOCK:
        mass = np.cumsum(weights, dtype=np.float64)
        return _within(weights, mass, at * mass[-1]), float(mass[-1])
    sums = _sums(weights)
    mass = np.cumsum(sums, dtype=np.float64)
    wanted = at * mass[-1]
    block = _within(sums, mass, wanted)
    inside = weights[block * BLOCK : (block + 1) * BLOCK]
    before = mass[block - 1] if block else 0.0
    place = block * BLOCK + _within(inside, np.cumsum(inside, dtype=np.float64), wanted - before)
    return place, float(mass[-1])


def _within(weights: Row, mass: NDArray[np.float64], wanted: Any) -> int:
    """The first place whose mass passes `wanted`; rounding may leave none, then the last that weighs anything."""
    found = int(np.searchsorted(mass, wanted, side="right"))
    return found if found < len(weights) else int(np.flatnonzero(weights)[-1])
