"""Attention over pieces: some queries, the keys and values that they may see, and how many of those come before them.

Every context (packed, tree, paged) falls apart into pieces, and a kind of attention is a function over pieces:
`eager` defines the meaning, `sdpa` computes it with torch's fused attention, `varlen.py` has those for CUDA devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention, softmax

QUERY_BLOCK = 128
"""Queries that share one mask: masks and score tensors have at most this many rows."""


@dataclass(frozen=True)
class Rule:
    """How one layer scores: `window` 0 is none, `cap` 0 is none, `sinks` (H,) are logits of a key that is nowhere."""

    scale: float
    window: int = 0
    cap: float = 0.0
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether torch's fused attention knows it."""
        return not self.cap and self.sinks is None


@dataclass(frozen=True)
class Piece:
    """q (B, H, Lq, D), k (B, KV, before + Lq, D), v (B, KV, before + Lq, Dv): query i sees keys up to before + i."""

    q: Tensor
    k: Tensor
    v: Tensor
    before: int


Kind = Callable[[Sequence[Piece], Rule], list[Tensor]]
"""Gives (B, H, Lq, Dv) for each piece."""


def eager(pieces: Sequence[Piece], rule: Rule) -> list[Tensor]:
    """The plain twin of every other kind: a dense mask a piece, one softmax in fp32."""
    return [scored(p.q, p.k, p.v, allowed(p, 0, p.q.shape[2], 0, rule.window), rule) for p in pieces]


def sdpa(pieces: Sequence[Piece], rule: Rule) -> list[Tensor]:
    """Torch's fused attention, piece by piece; a rule that it does not know goes block by block through `scored`."""
    return [_fused(piece, rule) for piece in pieces]


def _fused(piece: Piece, rule: Rule) -> Tensor:
    length, keys = piece.q.shape[2], piece.k.shape[2]
    if rule.plain and not 0 < rule.window < keys and (piece.before == 0 or length == 1):
        return fused(piece.q, piece.k, piece.v, rule, causal=length > 1)
    starts = range(0, length, QUERY_BLOCK)
    return torch.cat([_block(piece, rule, start, min(start + QUERY_BLOCK, length)) for start in starts], 2)


def _block(piece: Piece, rule: Rule, start: int, end: int) -> Tensor:
    """Queries [start, end) over the keys that the causal order and the window leave them."""
    last = piece.before + end
    first = max(0, piece.before + start - rule.window + 1) if rule.window else 0
    q, k, v = piece.q[:, :, start:end], piece.k[:, :, first:last], piece.v[:, :, first:last]
    mask = allowed(piece, start, end, first, rule.window)
    return fused(q, k, v, rule, mask=mask) if rule.plain else scored(q, k, v, mask, rule)


def fused(q: Tensor, k: Tensor, v: Tensor, rule: Rule, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Torch's `scaled_dot_product_attention`; key-value heads are shared by groups of query heads."""
    size = v.shape[3]
    if size < q.shape[3]:  # its memory-saving kernels want one head size: zeros change nothing but their choice
        v = pad(v, (0, q.shape[3] - size))
    shared = q.shape[1] != k.shape[1]
    if shared and q.is_cuda and (mask is not None or not short(q)):
        # of CUDA's kernels flash alone knows shared heads: the others would make all scores
        groups, shared = q.shape[1] // k.shape[1], False
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = scaled_dot_product_attention(q, k, v, mask, rule.dropout, causal, scale=rule.scale, enable_gqa=shared)
    return out[..., :size]


def short(q: Tensor) -> bool:
    """Whether attention is computed in 16 bits here."""
    return q.dtype.itemsize == 2 or torch.is_autocast_enabled(q.device.type)


def allowed(piece: Piece, start: int, end: int, first: int, window: int) -> Tensor:
    """(end - start, keys): which of the keys [first, before + end) the queries [start, end) of a piece see."""
    q = torch.arange(piece.before + start, piece.before + end, device=piece.q.device)[:, None]
    k = torch.arange(first, piece.before + end, device=piece.q.device)[None]
    mask = k <= q
    return mask & (k > q - window) if window else mask


def scored(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """The definition: scores, soft-cap, mask (boolean, or to add), sinks, softmax in fp32 or better, values."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(2, 3)).to(wide) * rule.scale
    if rule.cap:
        scores = torch.tanh(scores / rule.cap) * rule.cap
    # the lowest number, not -inf: a padded row that sees no key must stay finite
    scores = scores.masked_fill(~mask, torch.finfo(wide).min) if mask.dtype == torch.bool else scores + mask
    if rule.sinks is None:
        weights = softmax(scores, -1)
    else:
        sinks = rule.sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    return torch.dropout(weights.to(v.dtype), rule.dropout, train=rule.dropout > 0) @ v
