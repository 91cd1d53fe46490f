"""The order of samples of several sources by shares: a pure function of (seed, place), as the order of one set is."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmkit.core.errors import DataError
from llmkit.core.seed import mixed
from llmkit.data.mix import Mix, Turns, Weight, shares
from llmkit.data.node import Data
from llmkit.data.order import Order, keyed
from llmkit.data.prepared import Prepared


@dataclass
class Mixed:
    """Sources [begins[i], begins[i + 1]) of examples with `lengths`, drawn by their shares, `per_step` a step.

    Draw k is what it is whoever asks, and whatever was asked before: draws are made in order and kept.
    """

    seed: int
    begins: Sequence[int]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    weights: Sequence[Weight]
    mix: Mix
    per_step: int
    steps: int | None = None
    """Of the run; None where weights are the same all along."""
    drawn: array[int] = field(default_factory=lambda: array("q"))
    counts: list[int] = field(default_factory=list)
    """Of each source: the examples drawn so far."""
    turns: Turns = field(default_factory=Turns)
    epochs: list[int] = field(default_factory=list)
    """Draws at which an epoch was whole."""
    _passes: list[np.ndarray[Any, Any]] = field(default_factory=list)
    _done: list[int] = field(default_factory=list)
    _asked: tuple[float, list[float]] = (-1.0, [])

    def __post_init__(self) -> None:
        self.counts = [0] * len(self.weights)
        self._done = [0] * len(self.weights)
        self._passes = [self._order(source) for source in range(len(self.weights))]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps until every source, or the first, was seen whole; at most `steps` where those are given."""
        while not self.epochs:
            if self.steps is not None and len(self.drawn) >= self.steps * self.per_step:
                return self.steps
            self._draw()
        return -(-self.epochs[0] // self.per_step)

    def step(self, index: int) -> tuple[int, tuple[int, ...]]:
        """0-based step -> (epoch, row ids)."""
        start = index * self.per_step
        while len(self.drawn) < start + self.per_step:
            self._draw()
        return index // self.steps_per_epoch, tuple(self.drawn[start : start + self.per_step])

    def _draw(self) -> None:
        part = 0.0 if self.steps is None else min(1.0, len(self.drawn) // self.per_step / self.steps)
        if part != self._asked[0]:
            self._asked = part, shares(self.weights, self.mix.temperature, part)
        asked = self._asked[1]
        source = self.turns.next(asked)
        size = self.begins[source + 1] - self.begins[source]
        example = self.begins[source] + int(self._passes[source][self.counts[source] % size])
        self.drawn.append(example)
        self.turns.drawn(source, float(self.lengths[example]) if self.mix.by == "tokens" else 1.0, asked)
        self.counts[source] += 1
        if self.counts[source] % size == 0:
            self._passes[source] = self._order(source)
            self._done[source] += 1
            if (min if self.mix.stop == "all_exhausted" else max)(self._done) > 0:
                self.epochs.append(len(self.drawn))
                self._done = [0] * len(self._done)

    def _order(self, source: int) -> np.ndarray[Any, Any]:
        size = self.begins[source + 1] - self.begins[source]
        return keyed(mixed(self.seed, source), self.counts[source] // max(size, 1), size)


def natural(begins: Sequence[int], lengths: np.ndarray[Any, Any], mix: Mix) -> list[float]:
    """The sizes of sources, which are their shares where none is given."""
    parts = [lengths[start:end] for start, end in itertools.pairwise(begins)]
    return [float(part.sum()) if mix.by == "tokens" else float(len(part)) for part in parts]


def arranged(data: Data, made: Prepared, seed: int, per_step: int, steps: int | None) -> Order | Mixed:
    """The order of all examples: shuffled together, or by the shares of their sources.

    Raises:
        DataError: a source of a mix has no example.
    """
    if not data.mixed:
        return Order(seed, len(made), per_step)
    lengths = np.diff(made.starts)
    for index, (start, end) in enumerate(itertools.pairwise(made.begins)):
        if start == end:
            what = "has a share, and no row of it is left to learn from"
            raise DataError(what, fix="mend its rows, or leave it out", key=f"data.train.{index}")
    given = [source.weight for source in data.train if source.weight is not None]
    weights: Sequence[Weight] = given or natural(made.begins, lengths, data.mix)
    changing = any(isinstance(weight, tuple) for weight in weights)
    return Mixed(seed, made.begins, lengths, weights, data.mix, per_step, steps if changing else None)
