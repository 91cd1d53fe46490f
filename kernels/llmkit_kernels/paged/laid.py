"""How keys and values lie in blocks, and a step's spans as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

LANES = 16
DRAFTS = 64
"""Tokens of a tree: what one of them sees is a mask of so many bits."""


Run = tuple[int, int, int, Sequence[int], Sequence[int]]
"""Tokens [start, end) of the row after `past` others of their sequence, the blocks of all of them in order, and for a
tree the parent of each token in the span (-1: none but what came before)."""


@dataclass(frozen=True)
class Held:
    """The blocks of one layer: keys (blocks, KV, D, lanes) and values (blocks, KV, lanes, columns).

    Keys lie turned, so that a vector holds 16 of them; lanes and columns are rounded up to whole vectors. Of int8 each
    head of a token has a factor: `key_scales` and `value_scales` are (blocks, KV, lanes).
    """

    keys: Tensor
    values: Tensor
    block: int
    """Tokens of a block."""
    size: int
    """Dv; a value's other columns are 0."""
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def made(
        cls, blocks: int, block: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> Held:
        """Empty blocks for keys (KV, T, D) and values (KV, T, Dv); `shape` is (KV, D, Dv). No memory is touched that
        need not be: a system gives it page by page."""
        heads, size, value = shape
        lanes, columns = rounded(block), rounded(value)
        keys = torch.empty(blocks, heads, size, lanes, dtype=dtype, device=device)
        values = (torch.empty if columns == value else torch.zeros)(
            blocks, heads, lanes, columns, dtype=dtype, device=device
        )
        whole = dtype == torch.int8
        scales = [
            torch.empty(blocks, heads, lanes, dtype=torch.float32, device=device) if whole else None for _ in range(2)
        ]
        return cls(keys, values, block, value, *scales)

    def resized(self, blocks: int) -> Held:
        """Empty ones, as many."""
        shape = self.keys.shape[1], self.keys.shape[2], self.size
        return self.made(blocks, self.block, shape, self.keys.dtype, self.keys.device)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, keys first."""
        return [x for x in (self.keys, self.values, self.key_scales, self.value_scales) if x is not None]


@dataclass(frozen=True, eq=False)
class Laid:
    """A step's spans as tensors, made once for all layers."""

    slots: Tensor
    """(T,): where each token's key lies, block * size + place in it; -1 of no span."""
    spans: Tensor
    """(S, 5): first token, the one after the last, tokens before, where its blocks and its tree begin (-1: a chain)."""
    table: Tensor
    """The blocks of all spans, end to end."""
    seen: Tensor
    """Of the tokens of trees: bit j for token j of its span."""
    depths: Tensor
    """And how many of those come before it."""
    runs: tuple[Run, ...]
    """What it was made from."""
    firsts: tuple[int, ...]
    """Where the blocks of each begin in the table."""
    block: int
    """Tokens of a block."""
    full: bool
    """Whether every token is of a span."""
    tasks: dict[int, Tensor] = field(default_factory=dict)
    known: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    there: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)
    grids: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)
    flats: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    places: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def single(self) -> bool:
        """Whether every span is one token."""
        return self.full and all(run[1] - run[0] == 1 for run in self.runs)

    @property
    def chains(self) -> bool:
        """Whether every token is of a span, and none of a tree."""
        return self.full and not len(self.seen)

    @cached_property
    def most(self) -> tuple[int, int]:
        """Tokens of the longest span, and of the longest sequence."""
        return max(run[1] - run[0] for run in self.runs), max(run[1] - run[0] + run[2] for run in self.runs)

    def flat(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """On a device: where each key of each span's sequence lies (K,), the sequences end to end; and where spans and
        sequences begin in their rows, (S + 1,) each in int32. Nothing is waited for but one transfer."""
        if device not in self.flats:
            lengths = self.spans[:, 1] - self.spans[:, 0]
            whole = torch.stack([lengths, lengths + self.spans[:, 2]])
            starts, total = torch.nn.functional.pad(whole.cumsum(1), (1, 0)), int(whole[1].sum())
            given = torch.stack([starts[1, :-1], self.spans[:, 3], whole[1]]).to(device)
            of = torch.repeat_interleave(given[2], output_size=total)
            at = torch.arange(total, device=device) - given[0][of]
            block = self.on(device)[1][given[1][of] + at // self.block]
            ends = starts.to(torch.int32).to(device)
            self.flats[device] = block * self.block + at % self.block, ends[0], ends[1]
        return self.flats[device]

    def grid(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of spans of one token on a device: their blocks (S, most) and how many tokens each sees (S,); where a row has
        fewer blocks, its first stands in."""
        if device not in self.grids:
            used = [list(blocks[: past // self.block + 1]) for _, _, past, blocks, _ in self.runs]
            most = max(map(len, used))
            table = _whole([row + row[:1] * (most - len(row)) for row in used])
            self.grids[device] = table.to(device), _whole([run[2] + 1 for run in self.runs]).to(device)
        return self.grids[device]

    def place(self, which: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Block and place in it of each new token (`new`), or of each key of each span's sequence (`flat`): worked out
        once for all layers."""
        if (which, device) not in self.places:
            slots = self.on(device)[0] if which == "new" else self.flat(device)[0]
            self.places[which, device] = slots // self.block, slots % self.block
        return self.places[which, device]

    def by(self, queries: int) -> Tensor:
        """(N, 2): span and first query of every task of so many queries; the longest first."""
        if queries not in self.tasks:
            made = [
                (start - end - past, at, first)
                for at, (start, end, past, *_) in enumerate(self.runs)
                for first in range(0, end - start, queries)
            ]
            self.tasks[queries] = torch.tensor([task[1:] for task in sorted(made)], dtype=torch.int64).view(-1, 2)
        return self.tasks[queries]

    def addresses(self, queries: int) -> tuple[int, tuple[int, ...]]:
        """How many tasks of so many queries there are; and where slots, spans, table, trees and tasks lie: asked by
        each layer, worked out once."""
        if queries not in self.known:
            tasks = self.by(queries)
            held = (self.slots, self.spans, self.table, self.seen, self.depths, tasks)
            self.known[queries] = tasks.shape[0], tuple(x.data_ptr() for x in held)
        return self.known[queries]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Slots and table on a device."""
        if device not in self.there:
            self.there[device] = self.slots.to(device), self.table.to(device)
        return self.there[device]


def rounded(count: int) -> int:
    """Up to whole vectors."""
    return -(-count // LANES) * LANES


def lay(runs: Sequence[Run], size: int, count: int) -> Laid:
    """Spans over `count` blocks of `size` tokens.

    Raises:
        ValueError: a span overlaps another, has too few blocks or one that does not exist, or is no tree that can be.
    """
    slots: list[int] = []
    rows: list[tuple[int, ...]] = []
    table: list[int] = []
    seen: list[int] = []
    depths: list[int] = []
    covered = 0
    for run in runs:
        start, end, past, blocks, parents = run
        if not len(slots) <= start < end:
            raise ValueError(f"span [{start}, {end}) is empty, out of order or overlaps another")
        _check(run, size, count)
        slots += [-1] * (start - len(slots))
        slots += [blocks[at // size] * size + at % size for at in range(past, past + end - start)]
        rows.append((start, end, past, len(table), len(depths) if parents else -1))
        table += blocks
        covered += end - start
        if parents:
            masks, deep = tree(parents)
            seen += masks
            depths += deep
    given = (_whole(slots), _whole(rows).view(-1, 5), _whole(table), _whole(seen), _whole(depths))
    return Laid(*given, tuple(runs), tuple(row[3] for row in rows), size, covered == len(slots))


def _whole(numbers: Sequence[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def _check(run: Run, size: int, count: int) -> None:
    start, end, past, blocks, parents = run
    length = past + end - start
    if length > len(blocks) * size:
        raise ValueError(f"{length} tokens need {-(-length // size)} blocks; the span has {len(blocks)}")
    if blocks and not 0 <= min(blocks) <= max(blocks) < count:
        wrong = next(block for block in blocks if not 0 <= block < count)
        raise ValueError(f"block {wrong} does not exist; the store has {count}")
    if parents and (len(parents) != end - start or len(parents) > DRAFTS):
        raise ValueError(
            f"a tree of {end - start} tokens has {len(parents)} parents; it takes one each, at most {DRAFTS}"
        )


def tree(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each token what it sees of its span, itself too, as bits of a signed 64-bit number; and its depth.

    Raises:
        ValueError: a token comes before its parent.
    """
    masks: list[int] = []
    depths: list[int] = []
    for token, parent in enumerate(parents):
        if not -1 <= parent < token:
            raise ValueError(f"token {token} of a tree has parent {parent}, which is not before it")
        masks.append(1 << token | (masks[parent] if parent >= 0 else 0))
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return [mask - (1 << 64) if mask >> 63 else mask for mask in masks], depths
