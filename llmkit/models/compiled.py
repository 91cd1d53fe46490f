"""Attention by llmkit's compiled kernels, on a CPU in fp32: segments and their branches, and cached keys; all else goes
the way of sdpa."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit_kernels import attention, paged
from llmkit_kernels.build import lacks as nothing_compiled
from torch import Tensor

from llmkit.core.types import Packed, Paged, Tree
from llmkit.models.pieces import Piece, Rule, sdpa


def lacks(model: Any) -> str:
    """What keeps the compiled attention from being of use to this model, or nothing."""
    if next(model.parameters()).device.type != "cpu":
        return "runs on a CPU only"
    config = model.config.get_text_config()
    several = getattr(config, "is_heterogeneous", False)  # Gemma 4: layers of two head sizes
    for part in config.per_layer_config if several else [config]:
        heads = getattr(part, "num_attention_heads", None) or 1
        size = getattr(part, "head_dim", None) or (getattr(part, "hidden_size", None) or 0) // heads
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
    return known and attention.suits(q, k, v)


def packed(q: Tensor, k: Tensor, v: Tensor, attend: Packed | Tree, rule: Rule) -> Tensor:
    """One row (1, H, T, D) of segments -> (1, T, H, Dv); what has 16 bits is computed in fp32."""
    if any(segment.row for segment in attend.segments):
        raise ValueError("one row has segments of row 0")
    segments = [(segment.start, segment.end) for segment in attend.segments]
    parents = [segment.parent for segment in attend.segments] if isinstance(attend, Tree) else ()
    out = attention.causal(q[0].float(), k[0].float(), v[0].float(), segments, rule.scale, rule.window, parents)
    return out[None].to(q.dtype)


def reads(q: Tensor, k: Tensor, v: Tensor, attend: Paged, rule: Rule) -> bool:
    """Whether the kernel over cached keys takes this call."""
    return not rule.dropout and q.shape[0] == 1 and paged.suits(q[0], k[0], v[0], attend.laid.block)


def cached(layer: int, q: Tensor, k: Tensor, v: Tensor, attend: Paged, rule: Rule) -> Tensor:
    """Spans of one row (1, H, T, D) over blocks that hold what came before them -> (1, T, H, Dv)."""
    held = attend.store.held(layer, k[0], v[0])
    out = paged.attend(q[0], k[0], v[0], held, attend.laid, rule.scale, rule.window, rule.cap, rule.sinks)
    return out[None].to(q.dtype)
