"""The order of samples: a pure function of (seed, epoch, place), never of ranks, workers or history."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from llmkit.core.seed import mixed


class Ordered(Protocol):
    """Says which rows each step sees."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        ...

    def step(self, index: int) -> tuple[int, tuple[int, ...]]:
        """0-based step -> (epoch, row ids)."""
        ...


@dataclass(frozen=True)
class Order:
    """`rows` rows in steps of `per_step`; the last step of an epoch holds what is left."""

    seed: int
    rows: int
    per_step: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return -(-self.rows // self.per_step)

    def step(self, index: int) -> tuple[int, tuple[int, ...]]:
        """0-based step -> (epoch, row ids)."""
        epoch, within = divmod(index, self.steps_per_epoch)
        order = permutation(self.seed, epoch, self.rows)
        return epoch, tuple(int(i) for i in order[within * self.per_step : (within + 1) * self.per_step])


@dataclass(frozen=True)
class Repeated:
    """Each step of an order so many times in a row."""

    order: Ordered
    times: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return self.order.steps_per_epoch * self.times

    def step(self, index: int) -> tuple[int, tuple[int, ...]]:
        """0-based step -> (epoch, row ids)."""
        return self.order.step(index // self.times)


def spread(length: int, most: int | None) -> list[int]:
    """At most `most` of `length` places, evenly apart: files are often sorted, and their first rows alike."""
    if not most or most >= length:
        return list(range(length))
    return [place * length // most for place in range(most)]


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The order of one epoch, kept for the steps that follow."""
    return keyed(seed, epoch, rows)


def keyed(seed: int, epoch: int, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Row ids by the size of a random 64-bit key each: it rests on Philox's raw stream, which numpy keeps stable."""
    keys = np.random.Philox(key=mixed(seed, epoch)).random_raw(rows)
    return np.argsort(keys, kind="stable")
