"""Sequences of tokens as batches that are only read: packed in rows of bounded size, or padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from llmkit.core.types import Batch, Packed, Segment
from llmkit.data.pack import first_fit

TOKENS = 1024
"""Of one forward, about; a sequence that is longer has one of its own."""
ROWS = 4
"""Of one forward, where rows are padded."""


def laid(rows: Sequence[Sequence[int]], packed: bool, device: str) -> Iterator[tuple[list[int], Batch]]:
    """(indices into `rows`, a batch of them): inputs alone, each position with weight 1 and no label (0)."""
    if packed:
        groups = first_fit([len(row) for row in rows], TOKENS)
        yield from ((group, _flat([rows[i] for i in group], device)) for group in groups)
        return
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(order), ROWS):
        group = order[at : at + ROWS]
        yield group, _padded([rows[i] for i in group], device)


def _flat(rows: Sequence[Sequence[int]], device: str) -> Batch:
    ends = list(accumulate(map(len, rows)))
    segments = tuple(Segment(0, end - len(row), end) for end, row in zip(ends, rows, strict=True))
    tokens = torch.tensor([[token for row in rows for token in row]], device=device)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None].to(device)
    return _batch(tokens, positions, torch.ones(tokens.shape, device=device), Packed(segments), ())


def _padded(rows: Sequence[Sequence[int]], device: str) -> Batch:
    lengths = tuple(map(len, rows))
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    weights, positions = torch.zeros(tokens.shape), torch.zeros_like(tokens)
    for at, row in enumerate(rows):
        tokens[at, : len(row)] = torch.tensor(row)
        weights[at, : len(row)] = 1.0
        positions[at, : len(row)] = torch.arange(len(row))
    return _batch(tokens.to(device), positions.to(device), weights.to(device), None, lengths)


def _batch(
    tokens: torch.Tensor,
    positions: torch.Tensor,
    weights: torch.Tensor,
    attend: Packed | None,
    lengths: tuple[int, ...],
) -> Batch:
    return Batch(tokens, positions, torch.zeros_like(tokens), weights, attend, (), lengths)
