"""What training draws from: examples that are all known, or streams; and what a checkpoint holds of that."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from threading import Lock
from typing import Any, Protocol

import numpy as np

from llmkit.core.seed import mixed
from llmkit.data.chunk import Law
from llmkit.data.mix import Turns, shares
from llmkit.data.node import Data
from llmkit.data.order import Ordered
from llmkit.data.prepared import Prepared
from llmkit.data.render import Renderer
from llmkit.data.rows import BadRow
from llmkit.data.stream import Example, Place, Stream
from llmkit.data.usable import Tally


@dataclass(frozen=True)
class Drawn:
    """What a step sees."""

    epoch: int
    ids: tuple[int, ...]
    """Numbers of the examples, as they are told."""
    data: Prepared
    rows: Sequence[int]
    """Which examples of `data` they are."""


class Feed(Protocol):
    """Where the examples of each step come from."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass; of streams, in the run."""
        ...

    def begin(self, state: Mapping[str, Any]) -> None:
        """Goes to where a checkpoint was, or to the beginning, which has no state, whatever was drawn before."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds to go on with step `step`, the next one or the last that was drawn."""
        ...

    def step(self, index: int) -> Drawn:
        """What 0-based step `index` sees."""
        ...

    def counts(self) -> dict[str, int]:
        """The account of the rows that were read so far, where that grows."""
        ...


@dataclass(frozen=True)
class Known:
    """Examples that are all there, in an order that is a function of the step alone."""

    data: Prepared
    order: Ordered

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""
        return self.order.steps_per_epoch

    def begin(self, state: Mapping[str, Any]) -> None:
        """Nothing: the order is known."""

    def state(self, step: int) -> dict[str, Any]:
        """Nothing."""
        return {}

    def step(self, index: int) -> Drawn:
        """What 0-based step `index` sees."""
        epoch, ids = self.order.step(index)
        return Drawn(epoch, ids, self.data, ids)

    def counts(self) -> dict[str, int]:
        """Nothing that grows."""
        return {}


class Streams:
    """Streams by their shares, one step after the other."""

    def __init__(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        per_step: int,
        steps: int,
        aside: Callable[[BadRow], None] | None = None,
    ) -> None:
        renderer = Renderer(copy.deepcopy(tokenizer), data.train_on, data.train_reasoning)  # of the threads alone
        strict, alone = data.on_bad_row == "error" or aside is None, Lock()
        quiet = replace(data, lint=replace(data.lint, level="off"))
        laws = [Law(quiet, source.columns, strict=strict) for source in data.train]
        self.streams = [
            Stream(source, law, renderer, alone, mixed(seed, index), f"data.train.{index}", aside)
            for index, (source, law) in enumerate(zip(data.train, laws, strict=True))
        ]
        self.data, self.weights = quiet, [source.weight or 1.0 for source in data.train]
        self.per_step, self.steps = per_step, steps
        self.turns, self.next = Turns([0.0] * len(self.streams)), 0
        self.last: tuple[int, dict[str, Any]] = (-1, {})
        """The step that was drawn last, and where it begins."""
        self.fresh = False
        """Whether all is open at its beginning, so that nothing need be read again to be there."""

    @property
    def steps_per_epoch(self) -> int:
        """The steps of the run: where a pass ends is not known."""
        return self.steps

    def begin(self, state: Mapping[str, Any]) -> None:
        """Opens all sources, at the beginning or where a checkpoint was.

        Raises:
            DataError: a source cannot be read, or gives too few examples.
        """
        if not state and self.fresh:
            return
        self.fresh = False
        said = state or {"step": 0, "lacks": [0.0] * len(self.streams), "streams": [{} for _ in self.streams]}
        self.next, self.turns = int(said["step"]), Turns([float(lack) for lack in said["lacks"]])
        self.last = -1, {}
        for stream, place in zip(self.streams, said["streams"], strict=True):
            stream.begin(Place(**place))
        whole = [stream.whole for stream in self.streams]
        if None not in whole and (total := sum(filter(None, whole))) < self.per_step:
            Tally(self.data, Counter(self.counts())).check(total, self.per_step, "data.train")
        self.fresh = not state

    def state(self, step: int) -> dict[str, Any]:
        """Where step `step` begins: the next one, or the last that was drawn."""
        if step == self.last[0]:
            return self.last[1]
        if step != self.next:
            raise ValueError(f"step {step} of streams that are at {self.next}")
        places = [asdict(stream.place) for stream in self.streams]
        return {"step": step, "lacks": list(self.turns.lacks), "streams": places}

    def step(self, index: int) -> Drawn:
        """The examples of step `index`, the next one or the last that was drawn.

        Raises:
            DataError: a row cannot be read, or too many are unusable.
        """
        if index == self.last[0]:
            self.begin(self.last[1])
        self.last, self.fresh = (index, self.state(index)), False
        asked = shares(self.weights, self.data.mix.temperature, index / self.steps)
        drawn: list[Example] = []
        for _ in range(self.per_step):
            source = self.turns.next(asked)
            drawn.append(self.streams[source].take())
            amount = float(len(drawn[-1].ids)) if self.data.mix.by == "tokens" else 1.0
            self.turns.drawn(source, amount, asked)
        self.next = index + 1
        ids = tuple(range(index * self.per_step, (index + 1) * self.per_step))
        passes = min(stream.place.passes for stream in self.streams)
        return Drawn(passes, ids, _prepared(drawn), range(len(drawn)))

    def counts(self) -> dict[str, int]:
        """The account of all rows up to the ends of the windows."""
        return dict(sum((stream.counts for stream in self.streams), Counter[str]()))


def _prepared(drawn: Sequence[Example]) -> Prepared:
    starts = np.cumsum([0, *(len(example.ids) for example in drawn)]).astype(np.int64)
    ids = np.concatenate([example.ids for example in drawn])
    weights = np.concatenate([example.weights for example in drawn])
    return Prepared(ids, weights, starts, (), places=tuple(example.place for example in drawn))
