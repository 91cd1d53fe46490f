"""Attention by llmkit's compiled kernel: packed segments of fp32 on a CPU; all else goes the way of sdpa."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from llmkit_kernels import attention
from llmkit_kernels.build import lacks as nothing_compiled
from torch import Tensor

from llmkit.core.types import Packed, Segment
from llmkit.models.pieces import Piece, Rule, sdpa


def lacks(model: Any, half: bool) -> str:
    """What keeps the compiled attention from being of use to this model, or nothing."""
    if half or next(model.parameters()).device.type != "cpu":
        return "computes in fp32 on a CPU only"
    return nothing_compiled()


def pieces(given: Sequence[Piece], rule: Rule) -> list[Tensor]:
    """What is no packed row."""
    return sdpa(given, rule)


def suits(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> bool:
    """Whether the kernel takes this call."""
    known = rule.plain and not rule.dropout and q.shape[0] == 1
    return known and attention.suits(q, k, v) and not torch.is_autocast_enabled("cpu")


def packed(q: Tensor, k: Tensor, v: Tensor, attend: Packed, rule: Rule) -> Tensor:
    """One row (1, H, T, D) of segments -> (1, T, H, Dv)."""
    segments = _checked(attend.segments, q.shape[2])
    return attention.causal(q[0], k[0], v[0], segments, rule.scale, rule.window)[None]


@lru_cache(16)
def _checked(segments: tuple[Segment, ...], tokens: int) -> tuple[tuple[int, int], ...]:
    """Begin and end of each; what lies outside of the row or over another would be read and written as memory."""
    end = 0
    for segment in sorted(segments, key=lambda segment: segment.start):
        if not end <= segment.start < segment.end <= tokens or segment.row or segment.parent >= 0:
            what = f"segment [{segment.start}, {segment.end}) of row {segment.row}"
            raise ValueError(f"{what} is empty, overlaps another or leaves the row of {tokens} tokens")
        end = segment.end
    return tuple((segment.start, segment.end) for segment in segments)
