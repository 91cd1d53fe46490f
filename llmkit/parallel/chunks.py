"""Tensors that lie on several ranks on their way into whole ones elsewhere, a bounded number of bytes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmkit.core.peers import Peers
from llmkit.core.sliced import Slice

CHUNK = 64 << 20
"""Bytes of one message, at most; a row of a tensor that is longer is one by itself."""
Lying = Callable[[str], Sequence[Slice]]
"""The name of a tensor -> what this rank holds of it."""
Spread = Callable[[Tensor, int], Any]
"""A tensor of a rank comes in the place of those of the others."""


@dataclass(frozen=True)
class Part:
    """Rows of a block that one rank sends."""

    name: str
    shape: tuple[int, ...]
    """Of the whole: that of the tensor, or of it laid flat."""
    start: tuple[int, ...]
    """Where in the whole they begin."""
    size: tuple[int, ...]
    block: int = 0
    """Which of the blocks that its owner holds of the tensor."""
    row: int = 0
    """The row of that block that they begin with."""

    @property
    def numel(self) -> int:
        """How many numbers."""
        return prod(self.size)

    def of(self, held: Sequence[Slice]) -> Tensor:
        """What its owner sends."""
        tensor = held[self.block].tensor
        return tensor if tensor.shape == self.size else tensor[self.row : self.row + self.size[0]]

    def put(self, into: Tensor, values: Tensor) -> None:
        """The whole has these numbers."""
        place = tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))
        into.view(self.shape)[place].copy_(values.view(self.size))


@dataclass(frozen=True)
class Message:
    """Parts of one owner and of one type, end to end."""

    owner: int
    kind: torch.dtype
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        """How many numbers."""
        return sum(part.numel for part in self.parts)


class Route:
    """Who sends what in which order: the same on all ranks, and the same each time."""

    def __init__(self, peers: Peers, names: Iterable[str], lying: Lying, takes: bool = True, most: int = CHUNK) -> None:
        """`takes`: whether this rank has a whole model that the tensors go into; `names` are those it holds parts of.

        Raises:
            ValueError: the blocks of all ranks are not the whole of a tensor.
        """
        self.rank, self.takes = peers.ranks.rank, takes
        held = {name: lying(name) for name in names}
        said = peers.gather([takes, {name: _told(blocks) for name, blocks in held.items() if blocks}])
        tables = [table for _, table in said]
        takers = [rank for rank, (one, _) in enumerate(said) if one]
        self.here: list[Part] = []
        """What all who take it hold already."""
        sent: list[tuple[int, torch.dtype, Part]] = []
        for name in dict.fromkeys(name for table in tables for name in table):
            for kind, holders, part in _blocks(name, tables):
                if all(rank in holders for rank in takers):
                    self.here.append(replace(part, block=holders.get(self.rank, 0)))
                else:
                    owner = next(iter(holders))
                    rows = _rows(replace(part, block=holders[owner]), most // kind.itemsize)
                    sent += [(owner, kind, piece) for piece in rows]
        self.messages = list(_messages(sent, most))

    def follow(self, lying: Lying, into: Mapping[str, Tensor], device: str, spread: Spread | None = None) -> None:
        """Tensors go into whole ones (`into`, by name), message by message: called by every rank. A message lies on
        `device`, where `spread` passes it on; without one, torch's default group does."""
        with torch.no_grad():
            for part in self.here if self.takes else ():
                part.put(into[part.name], part.of(lying(part.name)))
            for message in self.messages:
                self._pass_on(message, lying, into, device, spread or dist.broadcast)

    def _pass_on(self, message: Message, lying: Lying, into: Mapping[str, Tensor], device: str, spread: Spread) -> None:
        room = torch.empty(message.numel, dtype=message.kind, device=device)
        sizes = [part.numel for part in message.parts]
        if message.owner == self.rank:
            for part, place in zip(message.parts, room.split(sizes), strict=True):
                place.view(part.size).copy_(part.of(lying(part.name)))
        spread(room, message.owner)
        if self.takes:
            for part, values in zip(message.parts, room.split(sizes), strict=True):
                part.put(into[part.name], values)


def _told(blocks: Sequence[Slice]) -> list[Any]:
    """As JSON has it."""
    kind = str(blocks[0].tensor.dtype).removeprefix("torch.")
    return [kind, list(blocks[0].shape), [[list(one.start), list(one.tensor.shape)] for one in blocks]]


def _blocks(name: str, tables: Sequence[Mapping[str, Any]]) -> Iterator[tuple[torch.dtype, dict[int, int], Part]]:
    """Each block of a tensor: its type, the ranks that hold it, each with which of its blocks it is, and where it lies.

    Raises:
        ValueError: they are not the whole of it.
    """
    found: dict[Part, dict[int, int]] = {}
    kinds = set()
    for rank, table in enumerate(tables):
        kind, shape, blocks = table.get(name, (None, (), ()))
        kinds |= {kind} - {None}
        for at, (start, size) in enumerate(blocks):
            part = Part(name, tuple(shape), tuple(start), tuple(size))
            if part.numel:
                found.setdefault(part, {}).setdefault(rank, at)
    shape = next(iter(found)).shape if found else ()
    if len(kinds) != 1 or len({part.shape for part in found}) != 1 or sum(p.numel for p in found) != prod(shape):
        raise ValueError(f"what the ranks hold of {name} is not the whole of it")
    for part, holders in found.items():
        yield getattr(torch, kinds.copy().pop()), holders, part


def _rows(part: Part, most: int) -> Iterator[Part]:
    """A block in pieces of at most so many numbers, or of one row."""
    if part.numel <= most or not part.size:
        yield part
        return
    step = max(1, most // max(1, prod(part.size[1:])))
    for row in range(0, part.size[0], step):
        size = (min(step, part.size[0] - row), *part.size[1:])
        yield replace(part, start=(part.start[0] + row, *part.start[1:]), size=size, row=row)


def _messages(sent: Iterable[tuple[int, torch.dtype, Part]], most: int) -> Iterator[Message]:
    """Small parts of one owner travel together."""
    waiting: dict[tuple[int, torch.dtype], list[Part]] = {}
    for owner, kind, part in sent:
        own = waiting.setdefault((owner, kind), [])
        if own and sum(one.numel for one in own) + part.numel > most // kind.itemsize:
            yield Message(owner, kind, tuple(own))
            own.clear()
        own.append(part)
    yield from (Message(owner, kind, tuple(own)) for (owner, kind), own in waiting.items() if own)
