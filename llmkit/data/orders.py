"""Other orders of samples than each row once in a row: balanced by class, and bucketed by length.

Like `order.py`, each is a pure function of (seed, step): a run that goes on needs no memory of what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from llmkit.core.seed import mixed
from llmkit.data.labelled import Labelled
from llmkit.data.mixed import arranged
from llmkit.data.node import Data
from llmkit.data.order import Ordered, permutation
from llmkit.data.prepare import Prepared

Rows = np.ndarray[Any, np.dtype[np.int64]]


class Balanced:
    """Samples in which every class has an equal share: of each run of C samples (C classes) each class gives one.

    `classes[i]` is the class of row i. The t-th sample of a class is the t-th row of an endless walk through its rows,
    a new random order each time around, so that its rows come equally often. An epoch has as many samples as rows.
    """

    def __init__(self, seed: int, classes: Sequence[int] | Rows, per_step: int) -> None:
        self.seed, self.per_step, self.rows = seed, per_step, len(classes)
        there = np.asarray(classes)
        self.members = [np.flatnonzero(there == one) for one in np.unique(there)]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return -(-self.rows // self.per_step)

    def step(self, index: int) -> tuple[int, tuple[int, ...]]:
        """0-based step -> (epoch, row ids)."""
        epoch, within = divmod(index, self.steps_per_epoch)
        first = within * self.per_step
        last = min(first + self.per_step, self.rows)
        return epoch, tuple(self._sample(epoch * self.rows + place) for place in range(first, last))

    def _sample(self, number: int) -> int:
        turn, place = divmod(number, len(self.members))
        which = int(_shuffled(self.seed, -1, turn, len(self.members))[place])
        members = self.members[which]
        around, spot = divmod(turn, len(members))
        return int(members[_shuffled(self.seed, which, around, len(members))[spot]])


@lru_cache(maxsize=256)
def _shuffled(seed: int, which: int, turn: int, rows: int) -> Rows:
    keys = np.random.Philox(key=mixed(seed, which, turn, rows)).random_raw(rows)
    return np.argsort(keys, kind="stable")


@dataclass(frozen=True)
class Bucketed:
    """Each row once an epoch, in steps whose rows are of one of `buckets` buckets of like length.

    The rows, sorted by length, are cut into buckets of whole steps; an epoch shuffles the rows of each bucket, cuts it
    into steps and shuffles those. Within a step rows go from short to long, so that micro-batches are alike too.
    """

    seed: int
    lengths: Rows
    per_step: int
    buckets: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return -(-len(self.lengths) // self.per_step)

    @cached_property
    def by_length(self) -> list[Rows]:
        """The rows of each bucket."""
        size = -(-self.steps_per_epoch // self.buckets) * self.per_step
        order = np.argsort(self.lengths, kind="stable")
        return [order[at : at + size] for at in range(0, len(order), size)]

    def step(self, index: int) -> tuple[int, tuple[int, ...]]:
        """0-based step -> (epoch, row ids)."""
        epoch, within = divmod(index, self.steps_per_epoch)
        ids = self._steps(epoch)[within]
        return epoch, tuple(int(i) for i in ids[np.argsort(self.lengths[ids], kind="stable")])

    def _steps(self, epoch: int) -> list[Rows]:
        steps = []
        for which, rows in enumerate(self.by_length):
            mixed_up = rows[_shuffled(self.seed, which, epoch, len(rows))]
            steps += [mixed_up[at : at + self.per_step] for at in range(0, len(rows), self.per_step)]
        return [steps[i] for i in permutation(self.seed, epoch, len(steps))]


@dataclass(frozen=True)
class ByTokens:
    """Each row once an epoch, in steps of about `tokens` tokens each: every epoch has the same number of steps.

    The rows of an epoch, end to end in a random order, are cut into equal parts of at least `tokens` tokens; a row is
    of the part that holds its middle. No part is empty, since none is shorter than the longest row.
    """

    seed: int
    lengths: Rows
    tokens: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return max(1, int(self.lengths.sum()) // max(self.tokens, int(self.lengths.max())))

    def step(self, index: int) -> tuple[int, tuple[int, ...]]:
        """0-based step -> (epoch, row ids)."""
        epoch, within = divmod(index, self.steps_per_epoch)
        order, parts = self._parts(epoch)
        return epoch, tuple(int(i) for i in order[parts == within])

    def _parts(self, epoch: int) -> tuple[Rows, Rows]:
        order = permutation(self.seed, epoch, len(self.lengths))
        sizes = self.lengths[order]
        middles = 2 * np.cumsum(sizes) - sizes
        return order, middles * self.steps_per_epoch // (2 * int(sizes.sum()))


def ordered(
    data: Data, seed: int, train: Prepared, per_step: int, steps: int | None = None, tokens: int = 0
) -> Ordered:
    """The order that a recipe asks for; `steps` are those of the run, where it says them, `tokens` those of a step.

    Raises:
        DataError: a source of a mix has no example.
    """
    if data.sampler is not None and isinstance(train, Labelled):
        return Balanced(seed, train.groups if data.sampler.balance == "group" else train.class_of, per_step)
    if data.length_buckets is not None:
        return Bucketed(seed, np.diff(train.starts), per_step, data.length_buckets)
    if tokens:
        return ByTokens(seed, np.diff(train.starts), tokens)
    return arranged(data, train, seed, per_step, steps)


def padding(order: Bucketed | Any, lengths: Rows, steps: int) -> float:
    """The share of cells that are padding when each of the first `steps` steps is one padded batch."""
    cells = held = 0
    for index in range(steps):
        here = lengths[list(order.step(index)[1])]
        cells, held = cells + len(here) * int(here.max()), held + int(here.sum())
    return 1 - held / cells
