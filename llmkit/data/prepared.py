"""Examples of several sources end to end, over maps of their files: nothing is held but where things begin."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np

from llmkit.data.cache import Part
from llmkit.data.chunk import row_of
from llmkit.data.lint import Lint
from llmkit.data.rows import Row

T = TypeVar("T")


class Numbers(Protocol):
    """Numbers in a row: an array, or several as one."""

    def __len__(self) -> int: ...

    def __getitem__(self, here: slice, /) -> np.ndarray[Any, Any]: ...

    def sum(self) -> Any:
        """All of them together."""
        ...


@dataclass(frozen=True)
class Joined:
    """Arrays as one, none of them copied."""

    parts: tuple[np.ndarray[Any, Any], ...]
    begins: tuple[int, ...]

    def __len__(self) -> int:
        return self.begins[-1]

    def __getitem__(self, here: slice) -> np.ndarray[Any, Any]:
        start, end, _ = here.indices(len(self))
        first = bisect_right(self.begins, start) - 1
        if end <= self.begins[min(first + 1, len(self.parts))]:
            base = self.begins[first]
            return self.parts[min(first, len(self.parts) - 1)][start - base : max(start, end) - base]
        cut = [
            part[max(0, start - base) : max(0, end - base)]
            for part, base in zip(self.parts, self.begins, strict=False)
            if base < end and base + len(part) > start
        ]
        return np.concatenate(cut)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.concatenate(self.parts).astype(dtype or self.parts[0].dtype, copy=False)

    def sum(self) -> Any:
        """All of them together."""
        return sum(part.sum() for part in self.parts)


def joined(parts: Sequence[np.ndarray[Any, Any]]) -> Numbers:
    """Arrays end to end."""
    if len(parts) == 1:
        return parts[0]
    return Joined(tuple(parts), (0, *accumulate(map(len, parts))))


class Lazily(Sequence[T], Generic[T]):
    """What is read when it is asked for, of all parts in order."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts, self.begins = parts, (0, *accumulate(map(len, parts)))
        self.bases = (0, *accumulate(int(part.facts["counts"].get("rows", 0)) for part in parts))

    def __len__(self) -> int:
        return self.begins[-1]

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...

    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        place = range(len(self))[index]
        which = bisect_right(self.begins, place) - 1
        return self.one(which, place - self.begins[which])

    def __iter__(self) -> Iterator[T]:
        for which, part in enumerate(self.parts):
            yield from (self.one(which, index) for index in range(len(part)))

    @abstractmethod
    def one(self, which: int, example: int) -> T:
        """What an example of a part has."""


class Rows(Lazily[Row]):
    """The row of each example."""

    def one(self, which: int, example: int) -> Row:
        """Read from its JSON."""
        part = self.parts[which]
        return row_of(part.row(int(part.arrays["owners"][example])), self.bases[which])


class Places(Lazily[tuple[str, int]]):
    """File and line of each example's row."""

    def one(self, which: int, example: int) -> tuple[str, int]:
        """As the part says."""
        return self.parts[which].place(example)


@dataclass(frozen=True)
class Prepared:
    """Token ids and weights of all examples, end to end; example i is [starts[i], starts[i + 1])."""

    ids: Numbers
    """int32."""
    weights: Numbers
    """float32."""
    starts: np.ndarray[Any, np.dtype[np.int64]]
    rows: Sequence[Row]
    """The row of each example; a split row gives several examples."""
    counts: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each file that was read."""
    places: Sequence[tuple[str, int]] = ()
    """File and line of each example's row."""
    lint: Lint | None = None
    """What is odd about the rows; None where nobody asks."""
    begins: tuple[int, ...] = ()
    """The first example of each source, and their number."""
    breaks: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Where within examples something begins that sees nothing of what is before it."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def length(self, index: int) -> int:
        """Tokens of an example."""
        return int(self.starts[index + 1] - self.starts[index])

    def example(self, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(ids, weights) of an example; the weight of a token is its weight as a target."""
        here = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.ids[here], self.weights[here]

    def sample(self, index: int) -> tuple[np.ndarray[Any, Any], ...]:
        """(tokens, labels, weights) of an example: position t predicts token t + 1, the last predicts nothing."""
        tokens, weights = self.example(index)
        labels, targets = np.zeros_like(tokens), np.zeros_like(weights)
        labels[:-1], targets[:-1] = tokens[1:], weights[1:]
        return tokens, labels, targets

    def segments(self, index: int) -> list[tuple[int, int]]:
        """The stretches [start, end) of an example that see themselves alone; one, where it has no breaks."""
        first, last = int(self.starts[index]), int(self.starts[index + 1])
        low, high = np.searchsorted(self.breaks, (first, last))
        cuts = [0, *(int(place) - first for place in self.breaks[low:high]), last - first]
        return list(pairwise(cuts))

    def supervised(self, index: int) -> float:
        """The sum of weights that an example trains with: its first token is never a target."""
        return float(self.weights[int(self.starts[index]) + 1 : int(self.starts[index + 1])].sum())
