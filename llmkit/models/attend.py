"""Attention under a context, registered with transformers' attention interface.

Shapes: q (B, H, T, D), k and v (B, KV, T, D or Dv). A context turns one call into pieces: some queries of one row, the
keys and values that they may see, and how many of those lie before the first query. A piece never builds a mask larger
than one block of queries by its keys, so memory is linear in T at a fixed length of segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from llmkit.core.errors import ModelError
from llmkit.core.types import Packed, Paged, Segment, Tree

QUERY_BLOCK = 128
NO_MASK = torch.empty(1, 1, 1, 1)
"""Given as `attention_mask` beside a context: transformers passes a 4-D mask on as it is and makes none of its own."""

Context = Packed | Tree | Paged

NAMES = {"sdpa": "llmkit_fused", "eager": "llmkit_plain", "flash": "llmkit_tiled", "flex": "llmkit_blocks"}
"""Our names in transformers' interface; one that held `sdpa` or `flash` would meet that kind's own checks."""


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
        """Whether torch's fused attention can do it."""
        return not self.cap and self.sinks is None


Piece = Callable[[Tensor, Tensor, Tensor, int, Rule], Tensor]
"""q (1, H, Lq, D), k and v (1, KV, Lk, D), keys before the first query, rule -> (1, H, Lq, Dv)."""


def fast_piece(q: Tensor, k: Tensor, v: Tensor, before: int, rule: Rule) -> Tensor:
    """One piece by torch's fused attention, or block by block where it does not know the rule."""
    windowed = 0 < rule.window < k.shape[2]
    if rule.plain and not windowed and before == 0:
        return _sdpa(q, k, v, rule, causal=True)
    if rule.plain and not windowed and q.shape[2] == 1:
        return _sdpa(q, k, v, rule, causal=False)
    blocks = [
        _block(q, k, v, before, rule, start, min(start + QUERY_BLOCK, q.shape[2]))
        for start in range(0, q.shape[2], QUERY_BLOCK)
    ]
    return torch.cat(blocks, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, rule: Rule, causal: bool, mask: Tensor | None = None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(
        q, k, v, mask, rule.dropout, causal and mask is None, scale=rule.scale, enable_gqa=grouped
    )


def _block(q: Tensor, k: Tensor, v: Tensor, before: int, rule: Rule, start: int, end: int) -> Tensor:
    """Queries [start, end) over the keys that the causal order and the window leave them."""
    last = before + end
    first = max(0, before + start - rule.window + 1) if rule.window else 0
    here, keys, values = q[:, :, start:end], k[:, :, first:last], v[:, :, first:last]
    mask = allowed(end - start, last - first, before + start - first, rule.window, q.device)
    if rule.plain:
        return _sdpa(here, keys, values, rule, causal=True, mask=mask)
    return scored(here, keys, values, mask, rule)


def allowed(queries: int, keys: int, before: int, window: int, device: torch.device) -> Tensor:
    """(queries, keys): the causal order, `before` keys in front of the first query, at most `window` keys a query."""
    q = torch.arange(before, before + queries, device=device)[:, None]
    k = torch.arange(keys, device=device)[None]
    mask = k <= q
    return mask & (k > q - window) if window else mask


def scored(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """The definition: scores, soft-cap, mask, sinks, softmax in fp32, values."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * rule.scale
    if rule.cap:
        scores = torch.tanh(scores / rule.cap) * rule.cap
    scores = scores.masked_fill(~mask, float("-inf"))
    if rule.sinks is not None:
        sinks = rule.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    else:
        weights = softmax(scores, -1)
    weights = torch.dropout(weights.to(v.dtype), rule.dropout, train=rule.dropout > 0)
    return weights @ v


def eager_piece(q: Tensor, k: Tensor, v: Tensor, before: int, rule: Rule) -> Tensor:
    """The plain twin of `fast_piece`: one dense mask, one softmax."""
    return scored(q, k, v, allowed(q.shape[2], k.shape[2], before, rule.window, q.device), rule)


def run_segments(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], rule: Rule, piece: Piece) -> Tensor:
    """Each segment over its ancestors and itself; tokens outside of all segments give zeros. (B, H, T, Dv)."""
    if _covers(segments, q.shape[0], q.shape[2]):
        rows = [[] for _ in range(q.shape[0])]  # type: list[list[Tensor]]
        for index, segment in enumerate(segments):
            rows[segment.row].append(_segment(q, k, v, segments, index, rule, piece))
        return torch.cat([torch.cat(row, 2) for row in rows], 0)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for index, segment in enumerate(segments):
        made = _segment(q, k, v, segments, index, rule, piece)
        out = out.index_put(
            (torch.tensor(segment.row, device=q.device), *_places(segment, q)), made[0], accumulate=False
        )
    return out


def _places(segment: Segment, q: Tensor) -> tuple[Tensor, Tensor]:
    heads = torch.arange(q.shape[1], device=q.device)[:, None]
    return heads, torch.arange(segment.start, segment.end, device=q.device)[None]


def _covers(segments: Sequence[Segment], rows: int, length: int) -> bool:
    """Whether the segments fill every row in order without a gap."""
    ends = [0] * rows
    for segment in segments:
        if segment.start != ends[segment.row]:
            return False
        ends[segment.row] = segment.end
    return all(end == length for end in ends)


def _segment(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], index: int, rule: Rule, piece: Piece
) -> Tensor:
    own = segments[index]
    chain = list(reversed(list(_ancestors(segments, own))))
    row = slice(own.row, own.row + 1)
    here = slice(own.start, own.end)
    keys, values = k[row, :, here], v[row, :, here]
    if chain:
        keys = torch.cat([*(k[row, :, s.start : s.end] for s in chain), keys], 2)
        values = torch.cat([*(v[row, :, s.start : s.end] for s in chain), values], 2)
    before = sum(s.end - s.start for s in chain)
    return piece(q[row, :, here], keys, values, before, rule)


def _ancestors(segments: Sequence[Segment], own: Segment) -> Iterator[Segment]:
    while own.parent >= 0:
        own = segments[own.parent]
        yield own


def run_paged(layer: int, q: Tensor, k: Tensor, v: Tensor, context: Paged, rule: Rule, piece: Piece) -> Tensor:
    """Each span over its cached keys and itself; the new ones are stored on the way."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for span in context.spans:
        here = slice(span.start, span.end)
        keys, values = context.store.put(layer, span, k[span.row, :, here], v[span.row, :, here])
        query = q[span.row : span.row + 1, :, here]
        out[span.row : span.row + 1, :, here] = piece(query, keys[None], values[None], span.past, rule)
    return out


def attention(piece: Piece) -> Callable[..., tuple[Tensor, None]]:
    """The function that transformers calls in every attention layer."""

    def run(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        attend: Context | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        rule = Rule(scale, sliding_window or 0, softcap or 0.0, s_aux, dropout if module.training else 0.0)
        if isinstance(attend, Paged):
            out = run_paged(cast(int, module.layer_idx), query, key, value, attend, rule, piece)
        elif attend is not None:
            out = run_segments(query, key, value, attend.segments, rule, piece)
        elif attention_mask is not None:
            out = _masked(query, key, value, attention_mask, rule)
        else:
            rows = [Segment(row, 0, query.shape[2]) for row in range(query.shape[0])]
            out = run_segments(query, key, value, rows, rule, piece)
        return out.transpose(1, 2).contiguous(), None

    return run


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """transformers' own way, for padded batches and for `generate`: its mask knows padding, windows and the cache."""
    mask = mask[..., : k.shape[2]]
    if rule.plain:
        return _sdpa(q, k, v, rule, causal=False, mask=mask if mask.dtype == torch.bool else mask.to(q.dtype))
    return scored(q, k, v, mask if mask.dtype == torch.bool else mask == 0, rule)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask where causality says it all; else transformers' boolean one."""
    unpadded = kwargs.get("attention_mask") is None and kwargs.get("q_length") == kwargs.get("kv_length")
    return None if unpadded else cast(Tensor, sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False}))


def install(model: Any, kind: str, half: bool = False) -> str:
    """Sets the attention of a loaded model; gives the kind used, `own` for a family that takes no other.

    `half`: the model computes in fp16 or bf16.

    Raises:
        ModelError: a kind that was asked for is not there.
    """
    if not model._can_set_attn_implementation():
        if kind in ("auto", "eager"):
            return "own"
        what = f"{type(model).__name__} brings its own attention and takes no other"
        raise ModelError(f"{what}: {kind} cannot be used", fix="use attention: auto", key="model.attention")
    if kind == "auto":
        kind = "flash" if half and _flash_missing() == "" else "sdpa"
    if kind == "flash" and (missing := _flash_missing()):
        raise ModelError(f"flash needs {missing}", fix="use attention: auto", key="model.attention")
    if kind == "flash" and not half:
        raise ModelError("flash computes in 16 bits only", fix="use precision: bf16_mixed", key="model.attention")
    name = NAMES[kind]
    AttentionInterface.register(name, attention(_pieces(kind)))
    AttentionMaskInterface.register(name, _mask)
    model.set_attn_implementation(name)
    return kind


def _flash_missing() -> str:
    """What flash attention lacks here, or nothing."""
    from importlib.util import find_spec

    if not torch.cuda.is_available():
        return "a CUDA device"
    return "" if find_spec("flash_attn") is not None else "the package flash-attn"


def _pieces(kind: str) -> Piece:
    return {"sdpa": fast_piece, "eager": eager_piece, "flash": flash_piece, "flex": flex_piece}[kind]


def flash_piece(q: Tensor, k: Tensor, v: Tensor, before: int, rule: Rule) -> Tensor:
    """One piece by flash-attn; its causal order is aligned to the last key, which is ours."""
    from flash_attn import flash_attn_func

    if rule.sinks is not None or q.shape[3] != v.shape[3]:
        return fast_piece(q, k, v, before, rule)
    window = (rule.window - 1, 0) if rule.window else (-1, -1)
    out = flash_attn_func(
        *(t.transpose(1, 2) for t in (q, k, v)),
        dropout_p=rule.dropout,
        softmax_scale=rule.scale,
        causal=True,
        window_size=window,
        softcap=rule.cap,
    )
    return cast(Tensor, out.transpose(1, 2))


def flex_piece(q: Tensor, k: Tensor, v: Tensor, before: int, rule: Rule) -> Tensor:
    """One piece by flex attention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if rule.sinks is not None or rule.dropout or q.shape[3] != v.shape[3]:
        return fast_piece(q, k, v, before, rule)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        mask = j <= i + before
        return mask & (j > i + before - rule.window) if rule.window else mask

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.tanh(score / rule.cap) * rule.cap if rule.cap else score

    block = create_block_mask(visible, None, None, q.shape[2], k.shape[2], device=q.device)
    grouped = q.shape[1] != k.shape[1]
    out = flex_attention(q, k, v, score_mod=capped, block_mask=block, scale=rule.scale, enable_gqa=grouped)
    return cast(Tensor, out)
