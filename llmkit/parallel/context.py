"""Context parallelism: the ranks that hold parts of one packed row, and how a row is dealt to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from llmkit.core.types import Batch, Exchange, Packed, Segment, Split, Stretch
from llmkit.parallel.grid import Grid

Method = Literal["ulysses", "ring"]


class Neighbours:
    """Implements `Exchange` over a process group."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.index, self.count = dist.get_rank(group), dist.get_world_size(group)

    def swap(self, chunks: Tensor) -> Tensor:
        """(N, ...): chunk i goes to rank i; gives what each of them has for this one."""
        made = torch.empty_like(chunks)
        dist.all_to_all_single(made, chunks, group=self.group)
        return made

    def shift(self, tensors: Sequence[Tensor], by: int) -> Callable[[], list[Tensor]]:
        """Begins to send to the rank `by` places on; the call that it gives waits for what comes from as far before."""
        made = [torch.empty_like(tensor) for tensor in tensors]
        to, start = ((self.index + step) % self.count for step in (by, -by))
        there = [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=to) for tensor in tensors]
        back = [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=start) for tensor in made]
        works = dist.batch_isend_irecv([*there, *back])

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return made

        return wait

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Tensors of one shape, of all ranks in their order."""
        made = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(made, tensor.contiguous(), group=self.group)
        return made


def splitter(grid: Grid, method: Method) -> Callable[[Batch], Batch]:
    """A batch of whole rows -> this rank's part of it."""
    return partial(split, exchange=Neighbours(grid.group("context")), method=method)


def split(batch: Batch, exchange: Exchange, method: Method) -> Batch:
    """This rank's part of a batch whose attention knows a context: (1, T / N).

    Rows lie end to end, and tokens of no segment fill them up until they can be dealt evenly. Positions and labels
    are what they were in the whole row; `ids` are those with a weight here, where each example is one segment.

    Raises:
        ValueError: the batch has no packed context.
    """
    if not isinstance(batch.attend, Packed):
        raise ValueError("a row is dealt to several ranks by its segments: give a batch with a packed context")
    rows, width = batch.tokens.shape
    whole = Packed(tuple(Segment(0, s.row * width + s.start, s.row * width + s.end) for s in batch.attend.segments))
    held = deal(rows * width, whole.segments, exchange.count, method)
    part = Split(whole, held, method, exchange)
    columns = (batch.tokens, batch.positions, batch.labels, batch.weights)
    more = part.tokens - rows * width
    tokens, positions, labels, weights = (part.cut(pad(column.reshape(1, -1), (0, more))) for column in columns)
    ids = _trained(batch, whole.segments, part.mine)
    return replace(
        batch, tokens=tokens, positions=positions, labels=labels, weights=weights, attend=part, ids=ids, lengths=()
    )


def deal(tokens: int, segments: Sequence[Segment], count: int, method: Method) -> tuple[tuple[Stretch, ...], ...]:
    """Which stretches of a row each rank holds; the row may end before they do.

    A ring's later tokens have more keys to meet: where a segment is longer than two ranks' parts, each rank holds one
    stretch from the beginning and one from the end, so that all have equally much to do. Shorter ones are near to even
    as they are, and their keys have fewer hops to make.
    """
    part = -(-tokens // count)
    if method == "ring" and max((s.end - s.start for s in segments), default=0) > min(2, count - 1) * part:
        half = -(-tokens // (2 * count))
        mirrored = [(rank, 2 * count - 1 - rank) for rank in range(count)]
        return tuple(tuple((at * half, (at + 1) * half) for at in pair) for pair in mirrored)
    return tuple(((rank * part, (rank + 1) * part),) for rank in range(count))


def _trained(batch: Batch, segments: Sequence[Segment], mine: Sequence[Stretch]) -> tuple[int, ...]:
    """The examples that have a weight in these stretches, if each is one segment; else all."""
    if len(segments) != len(batch.ids):
        return batch.ids
    weighted = (batch.weights.reshape(-1) != 0).tolist()

    def here(segment: Segment) -> bool:
        cuts = ((max(a, segment.start), min(b, segment.end)) for a, b in mine)
        return any(any(weighted[a:b]) for a, b in cuts)

    return tuple(example for example, segment in zip(batch.ids, segments, strict=True) if here(segment))
