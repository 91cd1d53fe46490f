"""How long the sequence of each token is: from a batch, from a row that several ranks hold, from positions alone."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit.core.types import Batch, Packed, Split, Tree


def lengths(batch: Batch) -> Tensor:
    """The length of each token's own sequence, (B, T) in fp32; 0 for padding. That of a branch begins with the prompt,
    which is as long as it is itself."""
    if isinstance(batch.attend, Split):
        return split_lengths(batch.attend, batch.tokens.device).float()
    sizes = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
    if batch.attend is None:
        for row, length in enumerate(batch.lengths):
            sizes[row, :length] = length
        return sizes
    return _filled(batch.attend, sizes)


def split_lengths(split: Split, device: torch.device) -> Tensor:
    """The length of the whole sequence of each token that this rank holds, (1, T / N); 0 for padding."""
    return split.cut(_filled(split.whole, torch.zeros(1, split.tokens, dtype=torch.int64, device=device)))


def sequence_lengths(positions: Tensor) -> Tensor:
    """Of each place in (B, T), the length of its sequence: the last position of its run, plus one."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    starts = begins.flatten().nonzero()[:, 0]
    last = torch.cat([starts[1:] - 1, starts.new_tensor([positions.numel() - 1])])
    run = begins.flatten().cumsum(0) - 1
    return (positions.flatten()[last] + 1)[run].view_as(positions)


def _filled(context: Packed | Tree, sizes: Tensor) -> Tensor:
    upto: list[int] = []
    for segment in context.segments:  # a parent is an earlier one
        before = upto[segment.parent] if segment.parent >= 0 else 0
        upto.append(before + segment.end - segment.start)
        sizes[segment.row, segment.start : segment.end] = upto[-1]
    return sizes
