"""How a tensor is cut along one dimension: which spans of the whole each rank holds, and how many hold the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Indices [start, end) of the whole; the same span lies on `share` ranks."""

    start: int
    end: int
    share: int = 1

    @property
    def length(self) -> int:
        """How many indices."""
        return self.end - self.start


Dealt = tuple[tuple[Span, ...], ...]
"""The spans of every rank."""


def deal(count: int, units: int, size: int = 1, start: int = 0) -> Dealt | None:
    """`units` blocks of `size` indices, the first at `start`, for `count` ranks; None where they cannot be dealt out
    evenly. Fewer blocks than ranks (key-value heads) lie on several ranks each."""
    if units and units % count == 0:
        width = units // count * size
        return tuple((Span(start + i * width, start + (i + 1) * width),) for i in range(count))
    if units and count % units == 0:
        share = count // units
        return tuple((Span(start + i // share * size, start + (i // share + 1) * size, share),) for i in range(count))
    return None


def joined(parts: Sequence[Dealt | None]) -> Dealt | None:
    """Parts that lie one after the other in one tensor, each dealt out; None where one of them cannot be."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return tuple(tuple(span for spans in rank for span in spans) for rank in zip(*known, strict=True))


@dataclass(frozen=True)
class Cut:
    """What rank `index` holds of a tensor of `shape`: its spans of dimension `dim`, one after the other. What is made
    of several parts (the rows of q, k and v in one) has a span of each."""

    shape: tuple[int, ...]
    dim: int
    dealt: Dealt
    index: int

    @property
    def spans(self) -> tuple[Span, ...]:
        """This rank's."""
        return self.dealt[self.index]

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of what lies here."""
        return self._with(sum(span.length for span in self.spans))

    @property
    def even(self) -> bool:
        """Whether every rank holds as much."""
        return len({sum(span.length for span in spans) for spans in self.dealt}) == 1

    @property
    def share(self) -> int:
        """On how many ranks each span lies; 0 where that differs from span to span."""
        shares = {span.share for spans in self.dealt for span in spans}
        return shares.pop() if len(shares) == 1 else 0

    def of(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, in memory of its own."""
        return torch.cat([whole.narrow(self.dim, span.start, span.length) for span in self.spans], self.dim)

    def views(self, part: Tensor, index: int | None = None) -> Iterator[tuple[Span, Tensor]]:
        """Each span of a rank (this one) with its place in what lies there."""
        at = 0
        for span in self.dealt[self.index if index is None else index]:
            yield span, part.narrow(self.dim, at, span.length)
            at += span.length

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole of what lies on all ranks."""
        made = parts[0].new_empty(self.shape)
        for index, part in enumerate(parts):
            for span, view in self.views(part, index):
                made.narrow(self.dim, span.start, span.length).copy_(view)
        return made

    def _with(self, length: int) -> tuple[int, ...]:
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])
