"""Figures of scores over pairs of a chosen and a rejected answer. Shapes: P pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkit.core.types import Report
from llmkit.stats.bins import calibration_error, edges, gaps
from llmkit.stats.bootstrap import difference, of_sums, ratio

Array = np.ndarray[Any, Any]
BINS = 10
"""Of the calibration error, with equally many pairs each."""


@dataclass(frozen=True)
class Pairs:
    """What is known of each pair, (P,) each."""

    up: Array
    """Scores of the chosen answers."""
    down: Array
    """Of the rejected ones."""
    long_up: Array
    """Tokens of the chosen answers."""
    long_down: Array
    """Of the rejected ones."""

    @property
    def gap(self) -> Array:
        """How much higher the chosen answer scores: the log-odds that it is the better one, by Bradley and Terry."""
        made: Array = np.asarray(self.up, np.float64) - self.down
        return made

    @property
    def right(self) -> Array:
        """1 where the chosen answer scores higher, half where both score alike."""
        return _wins(self.gap)

    @property
    def longer(self) -> Array:
        """1 where the chosen answer is the longer one, half where both are as long: who prefers the longer is right."""
        return _wins(self.long_up - self.long_down)


def _wins(gap: Array) -> Array:
    made: Array = (np.sign(gap) + 1) / 2
    return made


def by_length(pairs: Pairs) -> Array:
    """(P, 4): whether it is right and a 1, where the chosen answer is longer; and the same where it is shorter."""
    longer, shorter = pairs.longer == 1, pairs.longer == 0
    return np.stack([pairs.right * longer, longer, pairs.right * shorter, shorter], 1).astype(np.float64)


def length_controlled(sums: Array) -> Array:
    """The mean of the accuracies where the chosen answer is longer and where it is shorter, which is a half for whoever
    prefers long answers or short ones; sums are (..., 4) as `by_length` has them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Array = (sums[..., 0] / sums[..., 1] + sums[..., 2] / sums[..., 3]) / 2
    return mean


def moments(a: Array, b: Array) -> Array:
    """(N, 6): 1, a, b, a^2, b^2, ab about their means, which sums are exact enough about."""
    a, b = np.asarray(a, np.float64) - np.mean(a), np.asarray(b, np.float64) - np.mean(b)
    return np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], 1)


def correlation(sums: Array) -> Array:
    """Pearson's; sums are (..., 6) as `moments` has them."""
    n, a, b, aa, bb, ab = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        made: Array = (ab - a * b / n) / np.sqrt((aa - a * a / n) * (bb - b * b / n))
    return made


def of_lengths(pairs: Pairs) -> Array:
    """(P, 6): `moments` of scores with lengths, both answers of a pair together."""
    both = moments(np.concatenate([pairs.up, pairs.down]), np.concatenate([pairs.long_up, pairs.long_down]))
    made: Array = both[: len(pairs.up)] + both[len(pairs.up) :]
    return made


def sureness(pairs: Pairs) -> tuple[Array, Array]:
    """The chance that is given to the answer that scores higher, (P,), and whether that is the chosen one."""
    return 1 / (1 + np.exp(-np.abs(pairs.gap))), pairs.right


def columns(pairs: Pairs) -> dict[str, tuple[Array, Any]]:
    """Of each figure its columns (P, K), and what makes it of their sums."""
    said, was = sureness(pairs)
    return {
        "length_controlled_accuracy": (by_length(pairs), length_controlled),
        "ece": (gaps(said, was, edges(said, min(BINS, len(said)))), calibration_error),
        "length_correlation": (of_lengths(pairs), correlation),
        "margin_length_correlation": (moments(pairs.gap, pairs.long_up - pairs.long_down), correlation),
    }


def means(pairs: Pairs) -> dict[str, Array]:
    """Figures that are means over pairs, (P,) each."""
    gap = pairs.gap
    return {
        "loss": np.logaddexp(0, -gap),
        "accuracy": pairs.right,
        "length_accuracy": pairs.longer,
        "brier": np.square(1 / (1 + np.exp(gap))),
        "reward_margin": gap,
    }


def figures(pairs: Pairs) -> dict[str, float]:
    """All that can be measured of these pairs, by name."""
    made = {name: float(each.mean()) for name, each in means(pairs).items()}
    made |= {name: float(figure(table.sum(0))) for name, (table, figure) in columns(pairs).items()}
    return {name: value for name, value in made.items() if np.isfinite(value)}


def reports(name: str, pairs: Pairs, clusters: Sequence[str], seed: int) -> list[Report]:
    """The same with intervals over clusters of pairs; and how much oftener scores are right than length alone."""
    every = means(pairs)
    made = [ratio(f"{name}.{key}", each, None, clusters, seed=seed) for key, each in every.items()]
    both = (every["accuracy"], None), (every["length_accuracy"], None)
    made.append(difference(f"{name}.accuracy_beyond_length", *both, clusters, seed=seed))
    for key, (table, figure) in columns(pairs).items():
        if np.isfinite(figure(table.sum(0))):
            made.append(of_sums(f"{name}.{key}", table, figure, clusters, seed))
    return made
