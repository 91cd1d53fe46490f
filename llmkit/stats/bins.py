"""Bins of equally many values, and what is measured over them."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def edges(values: Array, bins: int) -> Array:
    """The inner edges, fewer than `bins`, between bins that hold equally many of `values`, as far as equal ones let
    them: those of a reference window are kept for other values."""
    inside = np.linspace(0, 1, bins + 1)[1:-1]
    found: Array = np.unique(np.quantile(np.asarray(values, np.float64), inside))
    inner: Array = found[found > np.min(values)]
    return inner


def placed(values: Array, edges: Array) -> Array:
    """The bin of each value: bin i is [edge i - 1, edge i)."""
    found: Array = np.searchsorted(edges, values, side="right")
    return found


def gaps(said: Array, was: Array, edges: Array) -> Array:
    """Of each value (N, bins + 1): what was said less what was, in the bin of what was said; and a 1. Sums of these
    rows over any examples give `calibration_error`."""
    table = np.zeros((len(said), len(edges) + 2))
    at = np.arange(len(said))
    table[at, placed(said, edges)] = said - was
    table[:, -1] = 1
    return table


def calibration_error(sums: Array) -> Array:
    """Expected calibration error (arXiv:1706.04599), the mean gap of confidence and accuracy over bins; sums are
    (..., bins + 1) as `gaps` has them."""
    error: Array = np.abs(sums[..., :-1]).sum(-1) / np.maximum(sums[..., -1], 1)
    return error
