"""Mixes: which source the next example comes from, so that shares are as asked over any stretch of a run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llmkit.core.config import Conflict, config, setting

Weight = float | tuple[tuple[float, float], ...]
"""A source's share relative to the others', or points (part of the run from 0 to 1, share), with straight lines between
them."""


@config
class Mix:
    """How sources are mixed that have a `weight`."""

    by: Literal["tokens", "rows"] = "tokens"
    """What shares are of."""
    temperature: float = setting(default=1.0, above=0.0, most=1e6)
    """Shares are taken to the power of 1 / temperature: above 1 the small sources gain (arXiv 1910.10683, 3.5.2).
    Without weights, a source's share is its size."""
    stop: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    """An epoch ends when every source was seen whole, or the first one; a source that ends begins anew, reshuffled."""


def schedule_problems(weight: Weight | None, key: str) -> Iterator[Conflict]:
    """What is wrong with a weight."""
    fix = "write [[0, 1.0], [0.5, 0.2]]: parts of the run, ascending from 0, each with a share"
    if isinstance(weight, tuple) and any(len(point) != 2 for point in weight):
        yield Conflict(key, "a point is no pair of a part and a share", fix)
    elif isinstance(weight, tuple):
        places = [at for at, _ in weight]
        if not weight or places[0] != 0 or places != sorted(set(places)) or places[-1] > 1:
            yield Conflict(key, "its points do not ascend from 0 to at most 1", fix)
        elif min(share for _, share in weight) < 0 or max(share for _, share in weight) <= 0:
            yield Conflict(key, "a share is below 0, or all are 0", fix)
    elif weight is not None and weight <= 0:
        yield Conflict(key, f"{weight:g} is no share", "give a number above 0, or leave the source out")


def weight_at(weight: Weight, part: float) -> float:
    """The share at a part of the run."""
    if not isinstance(weight, tuple):
        return float(weight)
    after = bisect_right([at for at, _ in weight], part)
    (start, low), (end, high) = weight[after - 1], weight[min(after, len(weight) - 1)]
    return low if end <= start else low + (high - low) * (part - start) / (end - start)


def shares(weights: Sequence[Weight], temperature: float, part: float = 0.0) -> list[float]:
    """The shares of all sources, which add up to 1."""
    held = [weight_at(weight, part) for weight in weights]
    most = max(held)  # so that no power overflows
    raised = [(weight / most) ** (1.0 / temperature) if weight > 0 else 0.0 for weight in held]
    return [weight / sum(raised) for weight in raised]


@dataclass
class Turns:
    """Whose turn it is: the source that lacks most of what it should have had by now.

    What a source lacks stays within a few of the longest examples, so that the shares of any stretch of a run differ
    from what was asked by no more than these are of it.
    """

    lacks: list[float] = field(default_factory=list)
    """Of each source: its share of all that was drawn, less what was drawn of it."""

    def next(self, asked: Sequence[float]) -> int:
        """The source to draw from; the first among equals, and none that has no share now."""
        self.lacks = self.lacks or [0.0] * len(asked)
        return max((i for i in range(len(asked)) if asked[i] > 0), key=lambda i: (self.lacks[i], asked[i], -i))

    def drawn(self, source: int, amount: float, asked: Sequence[float]) -> None:
        """Counts what was drawn."""
        for index, share in enumerate(asked):
            self.lacks[index] += share * amount
        self.lacks[source] -= amount
