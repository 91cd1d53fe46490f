"""How a tensor is cut along one dimension: which spans of the whole each rank holds, and how many hold the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.core.sliced import Slice


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
    def share(self) -> int:
        """On how many ranks each span lies; 0 where that differs from span to span."""
        return next(iter(self.shares)) if len(self.shares) == 1 else 0

    def of(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, in memory of its own."""
        return torch.cat([whole.narrow(self.dim, span.start, span.length) for span in self.spans], self.dim)

    @property
    def shares(self) -> set[int]:
        """On how many ranks its spans lie, of any rank."""
        return {span.share for spans in self.dealt for span in spans}

    def within(self, block: Slice) -> Iterator[tuple[Span, int, Tensor]]:
        """Of a block of what lies here: each span, where in it the block begins, and what of it is in the block."""
        at, first, length = 0, block.start[self.dim], block.tensor.shape[self.dim]
        for span in self.spans:
            begin = max(first, at)
            many = max(0, min(first + length, at + span.length) - begin)
            yield span, begin - at if many else 0, block.tensor.narrow(self.dim, begin - first if many else 0, many)
            at += span.length

    def pieces(self, block: Slice) -> list[Slice]:
        """What a block of that which lies here is of each part of the whole; the parts, end to end along `dim`, are the
        whole. Of most tensors there is one."""
        made = []
        for k, (span, offset, tensor) in enumerate(self.within(block)):
            low, high = min(spans[k].start for spans in self.dealt), max(spans[k].end for spans in self.dealt)
            start = list(block.start)
            start[self.dim] = span.start - low + offset if tensor.shape[self.dim] else 0
            made.append(Slice(tensor, self._with(high - low), tuple(start)))
        return made

    def blocks(self, block: Slice) -> list[Slice]:
        """What a block of that which lies here is of the whole: one for each span."""
        made = []
        for span, offset, tensor in self.within(block):
            start = list(block.start)
            start[self.dim] = span.start + offset
            made.append(Slice(tensor, self.shape, tuple(start)))
        return made

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole of its parts."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), self.dim)

    def _with(self, length: int) -> tuple[int, ...]:
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])
