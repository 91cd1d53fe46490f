"""Who writes what: the blocks that the ranks hold of each tensor, each dealt to one of those that hold it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.checkpoint.tensors import DTYPES, size
from llmkit.core.errors import PeerError
from llmkit.core.sliced import State, whole

Layout = list[list[Any]]
"""What a rank holds, as JSON: [name, dtype, shape of the whole, start of the block, shape of the block]."""
Place = tuple[tuple[int, ...], tuple[int, ...]]
"""(start, shape)."""


@dataclass(frozen=True)
class Block:
    """A part of a tensor, which lies in the file of `rank`; `start` and `shape` have one number a dimension."""

    rank: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    """A tensor over all ranks: `blocks` cover it, none twice. Of an empty one there may be none."""

    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


def layout(state: State) -> Layout:
    """What this rank holds."""
    found = [(name, whole(held)) for name, held in state.items()]
    return [
        [name, DTYPES[part.tensor.dtype], list(part.shape), list(part.start), list(part.tensor.shape)]
        for name, part in found
    ]


def deal(layouts: Sequence[Layout]) -> dict[str, Whole]:
    """The layouts of all ranks, in their order -> who writes which block. Every rank finds the same: the largest block
    that several hold goes first, to the one of them that has least to write.

    Raises:
        PeerError: ranks hold a tensor differently, or what they hold does not make up a whole.
    """
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    holders: dict[str, dict[Place, list[int]]] = {}
    for rank, held in enumerate(layouts):
        for name, dtype, shape, start, block in held:
            kind = (dtype, tuple(shape))
            if kinds.setdefault(name, kind) != kind:
                raise _disagree(f"rank {rank} holds {name} as {kind}, and another rank as {kinds[name]}")
            places = holders.setdefault(name, {})
            if math.prod(block) or (block == shape and not places):  # of an empty tensor, one
                places.setdefault((tuple(start), tuple(block)), []).append(rank)
    for name, (_, shape) in kinds.items():
        if math.prod(shape) and not tiles(list(holders[name]), ((0,) * len(shape), shape)):
            raise _disagree(f"the ranks' parts of {name} do not make up its shape {list(shape)}")
    owners = _owners(kinds, holders, len(layouts))
    return {
        name: Whole(*kinds[name], tuple(Block(owners[name, place], *place) for place in places))
        for name, places in holders.items()
    }


def _owners(
    kinds: dict[str, tuple[str, tuple[int, ...]]], holders: dict[str, dict[Place, list[int]]], world: int
) -> dict[tuple[str, Place], int]:
    load, owners, open_ = [0] * world, {}, []
    for name, places in holders.items():
        for place, ranks in places.items():
            wide = size(kinds[name][0], place[1])
            if len(ranks) > 1:
                open_.append((wide, name, place, ranks))
                continue
            owners[name, place] = ranks[0]
            load[ranks[0]] += wide
    for wide, name, place, ranks in sorted(open_, key=lambda item: -item[0]):
        least = min(ranks, key=lambda rank: load[rank])
        owners[name, place] = least
        load[least] += wide
    return owners


def tiles(blocks: list[Place], around: Place) -> bool:
    """Whether blocks cover `around`, nothing twice; cuts go through from side to side, as a mesh makes them."""
    start, shape = around
    if len(blocks) == 1:
        return blocks[0] == around
    for axis in range(len(shape)):
        rows: dict[tuple[int, int], list[Place]] = {}
        for block in blocks:
            rows.setdefault((block[0][axis], block[1][axis]), []).append(block)
        at = start[axis]
        for begin, length in sorted(rows):
            at = begin + length if begin == at else -1
        if len(rows) > 1 and at == start[axis] + shape[axis]:
            return all(
                tiles(inner, (_put(start, axis, begin), _put(shape, axis, length)))
                for (begin, length), inner in rows.items()
            )
    return False


def _put(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


def _disagree(what: str) -> PeerError:
    return PeerError(f"no checkpoint can be written: {what}", fix="give every rank the same code and recipe")
