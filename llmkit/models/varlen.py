"""Kinds of attention for CUDA devices, which take all pieces in one call: laid end to end, told apart by length."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from llmkit.core.errors import ModelError
from llmkit.core.types import Packed, Paged
from llmkit.models.forked import Laid, brought
from llmkit.models.kinds import missing, outside
from llmkit.models.pieces import Piece, Rule, sdpa, short

BLOCK = 128
"""Side of a block of flex attention's mask."""
WHOLE = 8
"""Sizes of heads that flash attention takes are multiples of it."""


def flash_lacks(model: Any, half: bool) -> str:
    """What keeps flash-attn from running this model, or nothing."""
    config = model.config.get_text_config()
    if why := missing("flash", torch.cuda.is_available()):
        return why
    if not half:
        return "computes in 16 bits only"
    if not outside() and (getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_dropout", 0.0)):
        return "needs the package flash-attn for soft-caps and attention dropout"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "knows no attention sinks"
    return "wants keys and values of one head size" if hasattr(config, "v_head_dim") else ""


def flex_lacks(model: Any, half: bool) -> str:
    """What keeps flex attention from running this model, or nothing; uncompiled (on CPU) it would score T x T."""
    if why := missing("flex", torch.cuda.is_available()):
        return why
    dropout = getattr(model.config.get_text_config(), "attention_dropout", 0.0)
    return "knows no attention dropout" if dropout else ""


def flash(pieces: Sequence[Piece], rule: Rule) -> list[Tensor]:
    """flash attention over pieces of unequal length; its causal order is aligned to the last key, as ours is. What is
    asked outside of autocast in fp32, which it does not know, sdpa answers."""
    return tiled(pieces, rule, varlen_func()) if short(pieces[0].q) else sdpa(pieces, rule)


@lru_cache(maxsize=1)
def varlen_func() -> Callable[..., Tensor]:
    """The package's function where it is installed, else torch's own (arXiv 2307.08691)."""
    if outside():
        from flash_attn import flash_attn_varlen_func

        return cast(Callable[..., Tensor], flash_attn_varlen_func)
    from torch.nn.attention import varlen

    shares = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
    return partial(own_varlen, varlen.varlen_attn, shares)


def own_varlen(
    attn: Callable[..., Any],
    shares: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    q_most: int,
    k_most: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """torch's `varlen_attn` with the arguments of flash-attn's; `shares`: it lets several heads share keys.

    Raises:
        ModelError: dropout or a soft-cap, which torch's does not have.
    """
    if dropout_p or softcap:
        what = "torch's flash attention knows neither dropout nor soft-caps"
        raise ModelError(what, fix="use attention: auto, or pip install flash-attn", key="model.attention")
    size, groups = v.shape[-1], q.shape[1] // k.shape[1]
    more: dict[str, Any] = {}
    if groups > 1 and shares:
        more["enable_gqa"] = True
    elif groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if lacking := -q.shape[-1] % WHOLE:
        q, k, v = (pad(t, (0, lacking)) for t in (q, k, v))
    window = window_size if window_size[0] >= 0 else (-1, 0 if causal else -1)
    out = attn(q, k, v, q_starts, k_starts, q_most, k_most, scale=softmax_scale, window_size=window, **more)
    return cast(Tensor, out[..., :size])


def tiled(pieces: Sequence[Piece], rule: Rule, varlen_func: Callable[..., Tensor]) -> list[Tensor]:
    """`varlen_func` takes q (sum of Lq, H, D), k and v (sum of Lk, KV, D) and where each piece starts in them."""
    flat = [torch.cat([t.transpose(1, 2).flatten(0, 1) for t in parts]) for parts in _parts(pieces)]
    lengths = [tuple(t.shape[2] for t in parts for _ in range(t.shape[0])) for parts in _parts(pieces)[:2]]
    out = _varlen(flat, [_starts(n, flat[0].device) for n in lengths], [max(n) for n in lengths], rule, varlen_func)
    outs = torch.split(out, [p.q.shape[0] * p.q.shape[2] for p in pieces])
    return [o.view(p.q.shape[0], -1, *o.shape[1:]).transpose(1, 2) for o, p in zip(outs, pieces, strict=True)]


def row_lengths(attend: Packed, shape: Sequence[int]) -> tuple[int, ...]:
    """Of a row (1, H, T, D) that is segments end to end, without parents: their lengths; nothing of another one."""
    at, lengths = 0, []
    for segment in attend.segments:
        if segment.row or segment.parent >= 0 or segment.start != at:
            return ()
        lengths.append(segment.end - at)
        at = segment.end
    return tuple(lengths) if shape[0] == 1 and at == shape[2] and all(n > 0 for n in lengths) else ()


def packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], rule: Rule, func: Callable[..., Tensor]
) -> Tensor:
    """Such a row, q (1, H, T, D) -> (1, T, H, Dv): nothing is cut and put together again, which costs a GPU some
    operations for each segment, layer and direction."""
    flat = [t[0].transpose(0, 1).contiguous() for t in (q, k, v)]
    starts, most = _starts(lengths, q.device), max(lengths)
    return _varlen(flat, [starts, starts], [most, most], rule, func)[None]


def branched(q: Tensor, k: Tensor, v: Tensor, laid: Laid, rule: Rule, func: Callable[..., Tensor]) -> Tensor:
    """A row of trees in one call too, q (1, H, T, D) -> (1, T, H, Dv): its causal order is aligned to the last key."""
    queries, keys, values = (_computed(t[0].transpose(0, 1)) for t in (q, k, v))
    flat = [queries.contiguous(), brought(keys, laid), brought(values, laid)]
    starts = [_starts(lengths, q.device) for lengths in (laid.lengths, laid.keys)]
    return _varlen(flat, starts, [max(laid.lengths), max(laid.keys)], rule, func)[None]


def packed_blocks(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], rule: Rule, func: Callable[..., Any]
) -> Tensor:
    """The same by a function with the signature of torch's `flex_attention`."""
    return _masked(q, k, v, tuple((length, 0) for length in lengths), rule, func).transpose(1, 2)


def paged(
    layer: int, q: Tensor, k: Tensor, v: Tensor, context: Paged, rule: Rule, func: Callable[..., Tensor]
) -> Tensor:
    """A step of chains over cached keys, q (1, H, T, D) -> (1, T, H, Dv): one call, whatever the number of spans."""
    context.store.write(layer, k[0], v[0], context.laid)
    keys, values = context.store.read_flat(layer, context.laid, q)
    starts = context.laid.flat(q.device)[1:]
    return _varlen([q[0].transpose(0, 1), keys, values], starts, context.laid.most, rule, func)[None]


def _varlen(
    flat: Sequence[Tensor], starts: Sequence[Tensor], most: Sequence[int], rule: Rule, func: Callable[..., Tensor]
) -> Tensor:
    return func(
        *map(_computed, flat),
        *starts,
        *most,
        dropout_p=rule.dropout,
        softmax_scale=rule.scale,
        causal=True,
        window_size=(rule.window - 1, 0) if rule.window else (-1, -1),
        softcap=rule.cap,
    )


def _computed(tensor: Tensor) -> Tensor:
    """In the type of autocast, where that is on."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


@lru_cache(maxsize=8)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once for all layers: a device would wait for the host at each."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def flex(pieces: Sequence[Piece], rule: Rule) -> list[Tensor]:
    """Compiled flex attention over all pieces, by a block mask made from the pieces' lengths."""
    return blocked(pieces, rule, flex_func())


@lru_cache(maxsize=1)
def flex_func() -> Callable[..., Any]:
    """torch's, compiled. Its kernel for few queries, which it would take by itself for less than 128, has no variant
    for every size of heads; the one for many takes all."""
    return partial(torch.compile(flex_attention, dynamic=True), kernel_options={"BACKEND": "TRITON"})


def blocked(pieces: Sequence[Piece], rule: Rule, flex_func: Callable[..., Any]) -> list[Tensor]:
    """`flex_func` has the signature of torch's `flex_attention`.

    Raises:
        ModelError: attention dropout, which flex attention does not have.
    """
    q, k, v = (torch.cat([row for t in parts for row in torch.split(t, 1)], 2) for parts in _parts(pieces))
    shapes = tuple((p.q.shape[2], p.before) for p in pieces for _ in range(p.q.shape[0]))
    outs = iter(torch.split(_masked(q, k, v, shapes, rule, flex_func), [length for length, _ in shapes], 2))
    return [torch.cat([next(outs) for _ in range(p.q.shape[0])]) for p in pieces]


def _masked(
    q: Tensor, k: Tensor, v: Tensor, shapes: tuple[tuple[int, int], ...], rule: Rule, flex_func: Callable[..., Any]
) -> Tensor:
    """Queries of pieces (length, tokens before) end to end over their keys end to end."""
    if rule.dropout:
        raise ModelError("flex knows no attention dropout", fix="use attention: auto", key="model.attention")

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return torch.tanh(score / rule.cap) * rule.cap

    mask = _block_mask(shapes, rule.window, q.device)
    shared = q.shape[1] != k.shape[1]
    score = capped if rule.cap else None
    out, lse = flex_func(q, k, v, score, mask, rule.scale, shared, return_lse=True)
    if rule.sinks is not None:  # a key without a value takes its share of the softmax
        out = out * torch.sigmoid(lse - rule.sinks.float().view(1, -1, 1))[..., None].to(out.dtype)
    return cast(Tensor, out)


@lru_cache(maxsize=8)
def _block_mask(shapes: tuple[tuple[int, int], ...], window: int, device: torch.device) -> BlockMask:
    """Query i of a piece sees the piece's own keys up to `before` + i. Made block by block: nothing is T x T."""
    q_piece, q_at = _laid([(length, before) for length, before in shapes], device)
    k_piece, k_at = _laid([(before + length, 0) for length, before in shapes], device)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        mask = (q_piece[i] == k_piece[j]) & (k_at[j] <= q_at[i])
        return mask & (k_at[j] > q_at[i] - window) if window else mask

    q_first, q_last = _ends(q_piece)
    k_first, k_last = _ends(k_piece)
    live = (q_first[:, None] <= k_last[None]) & (k_first[None] <= q_last[:, None])
    counts = live.sum(1, dtype=torch.int32)[None, None]
    order = live.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)[None, None]
    lengths = (len(q_piece), len(k_piece))
    return BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=lengths)


def _laid(pieces: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every token of pieces (length, first place) end to end: its piece and its place."""
    which = torch.cat([torch.full((length,), n, device=device) for n, (length, _) in enumerate(pieces)])
    return which, torch.cat([torch.arange(first, first + length, device=device) for length, first in pieces])


def _ends(which: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last piece in each block."""
    firsts = which[::BLOCK]
    lasts = which[(torch.arange(len(firsts), device=which.device) * BLOCK + BLOCK - 1).clamp(max=len(which) - 1)]
    return firsts, lasts


def _parts(pieces: Sequence[Piece]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return [p.q for p in pieces], [p.k for p in pieces], [p.v for p in pieces]
