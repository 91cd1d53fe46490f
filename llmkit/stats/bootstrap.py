"""Bootstrap intervals for ratios of sums, clustered and paired.

Every figure of ours is sum(numerators) / sum(denominators): a mean has denominators 1. Clusters are resampled whole;
with one example a cluster that is the ordinary bootstrap. Intervals are BCa (Efron 1987), with the acceleration from
the jackknife over clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.stats import norm

from llmkit.core.errors import DataError
from llmkit.core.types import Report

Array = np.ndarray
DRAWS = 2000
AT_ONCE = 1 << 18
"""Figures of resamples that are held at a time."""
Transform = Callable[[Array], Array]


def same(values: Array) -> Array:
    """No transform."""
    return values


def ratio(
    metric: str,
    top: Sequence[float] | Array,
    bottom: Sequence[float] | Array | None = None,
    clusters: Sequence[str] | None = None,
    transform: Transform = same,
    seed: int = 0,
    level: float = 0.95,
    slice: str = "all",
) -> Report:
    """transform(sum(top) / sum(bottom)) with its interval; `transform` is monotone (exp for a perplexity).

    Raises:
        DataError: there is nothing to measure.
    """
    tops, bottoms = _clustered(metric, top, bottom, clusters)
    value = float(transform(np.asarray(tops.sum() / bottoms.sum())))
    low, high = _interval([(tops, bottoms)], transform, seed, level)
    return Report(metric, slice, value, len(np.asarray(top)), low, high, level)


def difference(
    metric: str,
    new: tuple[Sequence[float] | Array, Sequence[float] | Array | None],
    old: tuple[Sequence[float] | Array, Sequence[float] | Array | None],
    clusters: Sequence[str] | None = None,
    transform: Transform = same,
    seed: int = 0,
    level: float = 0.95,
    slice: str = "all",
) -> Report:
    """The paired difference new - old of two ratios over the same examples in the same order.

    Raises:
        DataError: the two are not of the same examples.
    """
    if len(np.asarray(new[0])) != len(np.asarray(old[0])):
        raise DataError(f"{metric}: the tables are not of the same examples", fix="evaluate both on the same rows")
    a, b = (_clustered(metric, *pair, clusters) for pair in (new, old))
    value = float(_difference([a, b], transform))
    low, high = _interval([a, b], transform, seed, level)
    return Report(metric, slice, value, len(np.asarray(new[0])), low, high, level)


def of_sums(
    metric: str,
    columns: Array,
    figure: Transform,
    clusters: Sequence[str],
    seed: int = 0,
    level: float = 0.95,
    slice: str = "all",
) -> Report:
    """figure(sums of `columns` (N, K) over examples) with its interval; `figure` maps (..., K) to (...).

    Raises:
        DataError: there is nothing to measure.
    """
    if not len(columns):
        raise DataError(f"{metric}: there is nothing to measure", fix="give rows", key="evaluate")
    index = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(index), columns.shape[1]))
    np.add.at(sums, np.array([index[name] for name in clusters]), columns)
    total, n = sums.sum(0), len(sums)
    value, low, high = float(figure(total)), None, None
    if n > 1:
        rng, even, size = np.random.default_rng(seed), np.full(n, 1 / n), max(1, AT_ONCE // n)
        counts = (rng.multinomial(n, even, size=min(size, DRAWS - at)) for at in range(0, DRAWS, size))
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = np.concatenate([figure(part.astype(np.float64) @ sums) for part in counts])
            knife = figure(total - sums)
        low, high = _bca(drawn[np.isfinite(drawn)], value, knife[np.isfinite(knife)], level)
    return Report(metric, slice, value, len(columns), low, high, level)


def _clustered(
    metric: str, top: Sequence[float] | Array, bottom: Sequence[float] | Array | None, clusters: Sequence[str] | None
) -> tuple[Array, Array]:
    """Sums by cluster, clusters in order of first sight."""
    tops = np.asarray(top, dtype=np.float64)
    bottoms = np.ones_like(tops) if bottom is None else np.asarray(bottom, dtype=np.float64)
    if len(tops) == 0 or bottoms.sum() <= 0:
        raise DataError(
            f"{metric}: there is nothing to measure", fix="give an evaluation set with rows", key="evaluate"
        )
    if clusters is None:
        return tops, bottoms
    index = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    where = np.array([index[name] for name in clusters])
    return np.bincount(where, tops, len(index)), np.bincount(where, bottoms, len(index))


def _difference(pairs: Sequence[tuple[Array, Array]], transform: Transform) -> Array:
    """The figure of one pair, or the difference of two; sums run over the last axis."""
    values = [transform(top.sum(-1) / bottom.sum(-1)) for top, bottom in pairs]
    return values[0] if len(values) == 1 else values[0] - values[1]


def _interval(
    pairs: Sequence[tuple[Array, Array]], transform: Transform, seed: int, level: float
) -> tuple[float | None, float | None]:
    """Its ends; none for a single cluster, which tells nothing of how the figure varies."""
    n = len(pairs[0][0])
    if n == 1:
        return None, None
    value = float(_difference(pairs, transform))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.concatenate([_difference(part, transform) for part in _resampled(pairs, n, seed)])
        left_out = [_left_out(*pair, transform) for pair in pairs]
    drawn = drawn[np.isfinite(drawn)]
    knife = left_out[0] if len(left_out) == 1 else left_out[0] - left_out[1]
    return _bca(drawn, value, knife[np.isfinite(knife)], level)


def _resampled(pairs: Sequence[tuple[Array, Array]], n: int, seed: int) -> Iterator[list[tuple[Array, Array]]]:
    """The pairs in `DRAWS` resamples of their clusters, a few at a time: all at once would be gigabytes."""
    rng, even = np.random.default_rng(seed), np.full(n, 1 / n)
    size = max(1, AT_ONCE // n)
    for at in range(0, DRAWS, size):
        counts = rng.multinomial(n, even, size=min(size, DRAWS - at)).astype(np.float64)
        yield [(counts * top, counts * bottom) for top, bottom in pairs]


def _left_out(top: Array, bottom: Array, transform: Transform) -> Array:
    return transform((top.sum() - top) / (bottom.sum() - bottom))


def _bca(drawn: Array, value: float, knife: Array, level: float) -> tuple[float, float]:
    below = np.clip((drawn < value).mean() + (drawn == value).mean() / 2, 1e-6, 1 - 1e-6)
    bias = norm.ppf(below)
    off = knife.mean() - knife if len(knife) else np.zeros(1)
    spread = (off**2).sum() ** 1.5
    lean = (off**3).sum() / (6 * spread) if spread > 0 else 0.0
    ends = norm.ppf([(1 - level) / 2, (1 + level) / 2])
    shifted = norm.cdf(bias + (bias + ends) / (1 - lean * (bias + ends)))
    low, high = np.quantile(drawn, shifted)
    return float(low), float(high)
