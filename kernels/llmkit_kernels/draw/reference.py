"""What `draw` means, in plain numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def draw(law: NDArray[np.float32], sharp: float, top_p: float, min_p: float, at: float) -> tuple[int, float]:
    """law (V,) -> the place whose share of the weights that are kept holds `at`, counted in order; and their sum."""
    weights = np.exp((law - law.max()) * np.float32(sharp))
    if top_p < 1:
        falling = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[falling], dtype=np.float64)
        weights[falling[int(np.searchsorted(mass, top_p * mass[-1])) + 1 :]] = 0
    weights[weights < np.float32(min_p)] = 0
    mass = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(mass, at * mass[-1], side="right")), float(mass[-1])


def likeliest(rows: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """(R, V) -> (R, count): the columns of the largest of each row, the largest first and of equal ones the first."""
    return np.argsort(-rows, axis=1, kind="stable")[:, :count]
