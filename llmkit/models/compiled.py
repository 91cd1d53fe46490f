"""Attention by llmkit's compiled kernel: packed segments of fp32 on a CPU; all else goes the way of sdpa."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llmkit_kernels import attention
from llmkit_kernels.build import lacks as nothing_compiled
from torch import Tensor

from llmkit.core.types import Packed
from llmkit.models.pieces import Piece, Rule, sdpa


def lacks(model: Any, half: bool) -> str:
    """What keeps the compiled attention from being of use to this model, or nothing."""
    if half or next(model.parameters()).device.type != "cpu":
        return "computes in fp32 on a CPU only"
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", None) or 0) // heads
    if size % attention.LANES:
        return f"takes heads of a multiple of {attention.LANES}, not of {size}"
    if getattr(config, "attn_logit_softcapping", None):
        return "knows no soft-cap"
    return nothing_compiled("attention")


def pieces(given: Sequence[Piece], rule: Rule) -> list[Tensor]:
    """What is no packed row."""
    return sdpa(given, rule)


def suits(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> bool:
    """Whether the kernel takes this call."""
    known = rule.plain and not rule.dropout and q.shape[0] == 1
    return known and attention.suits(q, k, v) and not torch.is_autocast_enabled("cpu")


def packed(q: Tensor, k: Tensor, v: Tensor, attend: Packed, rule: Rule) -> Tensor:
    """One row (1, H, T, D) of segments -> (1, T, H, Dv)."""
    if any(segment.row or segment.parent >= 0 for segment in attend.segments):
        raise ValueError("a packed row has segments of row 0 without parents")
    segments = tuple((segment.start, segment.end) for segment in attend.segments)
    return attention.causal(q[0], k[0], v[0], segments, rule.scale, rule.window)[None]
