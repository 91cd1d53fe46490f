"""Prompts with completions that a policy drew, as groups of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmkit.data.groups import Groups
from llmkit.data.prepared import Prepared

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rolled(Groups):
    """Groups of completions, of which each counts what its loss says."""

    shares: Array = field(default_factory=lambda: np.zeros(0))
    """What each example adds to the count that a step is divided by."""

    def supervised(self, index: int) -> float:
        """As the loss counts."""
        return float(self.shares[index])


def rolled(
    asked: Prepared,
    prompts: Sequence[int],
    completions: Sequence[Sequence[Sequence[int]]],
    weights: Sequence[Sequence[Sequence[float]]],
    shares: Sequence[float],
    heads: Sequence[Sequence[int]] = (),
) -> Rolled:
    """The prompts of `asked` by number, each with its completions and the weights of their tokens; `heads` has the
    tokens of each prompt, where they are others than the row's."""
    ids: list[Array] = []
    counts: list[Array] = []
    starts, forks, at = [0], [], 0
    for place, (prompt, answers, own) in enumerate(zip(prompts, completions, weights, strict=True)):
        ids.append(np.asarray(heads[place] if heads else asked.example(prompt)[0], np.int32))
        counts.append(np.zeros(len(ids[-1]), np.float32))
        at += len(ids[-1])
        for answer, weight in zip(answers, own, strict=True):
            forks.append(at)
            ids.append(np.asarray(answer, np.int32))
            counts.append(np.asarray(weight, np.float32))
            at += len(answer)
        starts.append(at)
    return Rolled(
        ids=np.concatenate(ids),
        weights=np.concatenate(counts),
        starts=np.asarray(starts, np.int64),
        rows=[asked.rows[i] for i in prompts],
        places=[asked.places[i] for i in prompts],
        forks=np.asarray(forks, np.int64),
        firsts=np.cumsum([0, *map(len, completions)]).astype(np.int64),
        shares=np.asarray(shares, np.float64),
    )


def spread_out(rolled: Rolled, values: Sequence[Sequence[float]]) -> Array:
    """Figures of completions' tokens as `each` has them: as long as `ids`, 0 for prompts."""
    made = np.zeros(len(rolled.ids), np.float32)
    for begin, own in zip(rolled.forks.tolist(), values, strict=True):
        made[begin : begin + len(own)] = own
    return made


def figures(values: Mapping[str, Sequence[float]]) -> dict[str, Array]:
    """Figures of completions as `per` has them."""
    return {name: np.asarray(column, np.float32) for name, column in values.items()}
