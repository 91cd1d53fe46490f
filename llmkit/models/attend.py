"""Attention under a context, registered with transformers' attention interface.

A model gets the context as a keyword: `model(ids, position_ids=..., attend=Packed(...) | Tree(...) | Paged(...))`.
Without one it runs as transformers' own sdpa does, padded and with its cache. A context is cut into pieces
(`pieces.py`), so no mask is larger than one block of queries: memory is linear in T at a fixed length of segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from llmkit.core.errors import ModelError
from llmkit.core.types import Packed, Paged, Segment, Span, Split, Tree
from llmkit.models import compiled, ulysses, varlen
from llmkit.models.forked import laid
from llmkit.models.ordered_pieces import ordered
from llmkit.models.pieces import Kind, Piece, Rule, eager, fused, scored, sdpa, short
from llmkit.models.ring import ring
from llmkit.models.rotary import tell_lengths, turn_by_sequence, turns_by_sequence

Context = Packed | Tree | Paged | Split

KINDS: dict[str, Kind] = {
    "sdpa": sdpa,
    "compiled": compiled.pieces,
    "eager": eager,
    "flash": varlen.flash,
    "flex": varlen.flex,
    "ordered": ordered,
}
NAMES = {
    "sdpa": "llmkit_fused",
    "compiled": "llmkit_compiled",
    "eager": "llmkit_plain",
    "flash": "llmkit_tiled",
    "flex": "llmkit_blocks",
    "ordered": "llmkit_ordered",
}
"""Our names in transformers' interface; one that held `sdpa` or `flash` would meet that kind's own checks."""

NO_MASK = torch.zeros(1, 1, 1, 1)
"""Stands for the mask beside a context: transformers passes a 4-D mask on as it is and makes none of its own."""


def install(model: Any, kind: str, half: bool = False) -> str:
    """Sets the attention of a loaded model, and the rotations that contexts need; gives the kind used, `own` for a
    family that takes no other.

    `kind`: auto, sdpa, flash, flex or eager. `half`: the model computes in fp16 or bf16. `auto` takes flash where it
    runs, llmkit's compiled attention on a CPU, and sdpa elsewhere.

    Raises:
        ModelError: a kind that was asked for is not there, or cannot do what the family needs.
    """
    turn_by_sequence(model)
    if not model._can_set_attn_implementation():
        if kind in ("auto", "eager"):
            return "own"
        raise _refused(f"{type(model).__name__} brings its own attention and takes no other: {kind} cannot be used")
    if kind == "auto":
        kind = _best(model, half)
    lacks = {"flash": varlen.flash_lacks, "flex": varlen.flex_lacks}.get(kind)
    if lacks is not None and (why := lacks(model, half)):
        raise _refused(f"{kind} {why}")
    registered(kind)
    model.set_attn_implementation(NAMES[kind])
    if _beside_context not in model.base_model._forward_pre_hooks.values():
        model.base_model.register_forward_pre_hook(_beside_context, with_kwargs=True)
        if turns_by_sequence(model):
            model.base_model.register_forward_pre_hook(tell_lengths, with_kwargs=True)
    return kind


def registered(kind: str) -> str:
    """The name of one of our kinds in transformers' interface, where it is known from now on."""
    AttentionInterface.register(NAMES[kind], attention(KINDS[kind]))
    AttentionMaskInterface.register(NAMES[kind], sdpa_mask)
    return NAMES[kind]


def _best(model: Any, half: bool) -> str:
    if not varlen.flash_lacks(model, half):
        return "flash"
    return "sdpa" if compiled.lacks(model) else "compiled"


def _refused(what: str) -> ModelError:
    return ModelError(what, fix="use attention: auto", key="model.attention")


def _beside_context(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Before a forward with a context: no mask is made and nothing is cached."""
    if kwargs.get("attend") is None:
        return None
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.shape != NO_MASK.shape:
        raise ValueError("attend says which tokens are padding: leave attention_mask out")
    if kwargs.get("past_key_values") is not None:
        raise ValueError("a context keeps its own keys and values: leave past_key_values out")
    return args, {**kwargs, "attention_mask": NO_MASK, "use_cache": False}


def attention(kind: Kind) -> Callable[..., tuple[Tensor, None]]:
    """The function that transformers calls in every attention layer: (B, H, T, D) in, (B, T, H, Dv) out."""

    def run(
        module: nn.Module,
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
        **others: Any,
    ) -> tuple[Tensor, None]:
        rule = ruled(query, scaling, dropout, sliding_window, softcap, s_aux)
        torchs = kind in (sdpa, compiled.pieces)
        if attend is None and rule.plain and (torchs or (kind is not eager and attention_mask is not None)):
            own: Any = sdpa_attention_forward  # also under flash and flex, which take no mask
            out, _ = own(module, query, key, value, attention_mask, dropout, scaling, **others)
            return out, None
        if attend is None:
            return _uncontexted(query, key, value, attention_mask, rule, kind).transpose(1, 2).contiguous(), None
        if isinstance(attend, Split):
            if attend.method == "ring":
                return ring(query, key, value, attend, rule), None
            q, k, v, sinks = ulysses.by_heads(query, key, value, s_aux, attend)
            whole: Any = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": sinks, "attend": attend.whole}
            out, _ = run(module, q, k, v, None, scaling, dropout, **whole, **others)
            return ulysses.by_tokens(out, attend), None
        if isinstance(attend, Packed | Tree) and (out := _in_one(kind, query, key, value, attend, rule)) is not None:
            return out, None
        if isinstance(attend, Paged):
            _no_gradient(query)
            if kind is not eager and compiled.reads(query, key, value, attend, rule):
                return compiled.cached(_layer(module), query, key, value, attend, rule), None
            if kind is varlen.flash and short(query) and attend.laid.chains:
                func = varlen.varlen_func()
                return varlen.paged(_layer(module), query, key, value, attend, rule, func), None
            if kind in (sdpa, varlen.flash) and query.is_cuda and attend.laid.single:
                return decoded(_layer(module), query, key, value, attend, rule), None
            places, pieces = _cached(module, query, key, value, attend)
        else:
            places = list(attend.segments)
            pieces = [_piece(query, key, value, attend.segments, index) for index in range(len(places))]
        return _assembled(places, kind(pieces, rule), query, value.shape[3]), None

    return run


def ruled(
    query: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Rule:
    """How a layer scores, by what it tells of itself."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Rule(scale, sliding_window or 0, softcap or 0.0, s_aux, dropout)


def _in_one(kind: Kind, q: Tensor, k: Tensor, v: Tensor, attend: Packed | Tree, rule: Rule) -> Tensor | None:
    """A whole row of segments or of trees in one call, if this kind has it for such a row."""
    if kind is compiled.pieces and compiled.suits(q, k, v, rule):
        return compiled.packed(q, k, v, attend, rule)
    if isinstance(attend, Tree):
        if kind is varlen.flash and short(q) and (there := laid(attend.segments, q.shape, q.device)):
            return varlen.branched(q, k, v, there, rule, varlen.varlen_func())
        return None
    if kind is varlen.flex and (lengths := varlen.row_lengths(attend, q.shape)):
        return varlen.packed_blocks(q, k, v, lengths, rule, varlen.flex_func())
    if kind is varlen.flash and short(q) and (lengths := varlen.row_lengths(attend, q.shape)):
        return varlen.packed(q, k, v, lengths, rule, varlen.varlen_func())
    return None


def _uncontexted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, kind: Kind) -> Tensor:
    """transformers' own meaning of a mask, with the rules that its sdpa does not know."""
    length = q.shape[2]
    if mask is not None:
        return scored(q, k, v, mask[..., : k.shape[2]], rule)
    if length > 1:  # without a mask, keys past the queries are room in a fixed cache that is not filled yet
        k, v = k[:, :, :length], v[:, :, :length]
    return kind([Piece(q, k, v, k.shape[2] - length)], rule)[0]


def _piece(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], index: int) -> Piece:
    """A segment over its ancestors whole and itself."""
    own = segments[index]
    row, here = slice(own.row, own.row + 1), slice(own.start, own.end)
    chain = _ancestors(segments, index)
    spots = [slice(s.start, s.end) for s in chain] + [here]
    keys, values = (torch.cat([t[row, :, s] for s in spots], 2) if chain else t[row, :, here] for t in (k, v))
    return Piece(q[row, :, here], keys, values, sum(s.end - s.start for s in chain))


def _ancestors(segments: Sequence[Segment], index: int) -> list[Segment]:
    """From the root down to the parent."""
    chain: list[Segment] = []
    while (parent := segments[index].parent) >= 0:
        if parent >= index or segments[parent].row != segments[index].row:
            raise ValueError(f"segment {index} has parent {parent}, which is not an earlier segment of its row")
        chain.insert(0, segments[parent])
        index = parent
    return chain


def _layer(module: Any) -> int:
    return int(module.layer_idx)


def _no_gradient(q: Tensor) -> None:
    if torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("cached keys and values carry no gradient: run Paged under torch.no_grad()")


def decoded(layer: int, q: Tensor, k: Tensor, v: Tensor, context: Paged, rule: Rule) -> Tensor:
    """A step of single tokens in one call, whatever the number of sequences: for devices that are slow to be asked."""
    context.store.write(layer, k[0], v[0], context.laid)
    keys, values, there = context.store.read_single(layer, context.laid, q)
    if rule.window:
        at = torch.arange(there.shape[1], device=q.device)
        there = there & (at >= there.sum(1, keepdim=True) - rule.window)
    queries, mask = q[0].transpose(0, 1), there[:, None, None]
    if rule.sinks is not None:
        return scored(queries[:, :, None], keys, values, mask, rule)[None, :, :, 0]
    grouped = queries.unflatten(1, (keys.shape[1], -1))  # heads that share keys are queries of one: none is repeated
    out = fused(grouped, keys, values, rule, mask=mask) if rule.plain else scored(grouped, keys, values, mask, rule)
    return out.flatten(1, 2)[None]


def _cached(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, context: Paged) -> tuple[list[Segment], list[Piece]]:
    """Each span over its cached keys and itself; the new keys and values are stored on the way."""
    layer, laid = _layer(module), context.laid
    context.store.write(layer, k[0], v[0], laid)
    places: list[Segment] = []
    pieces: list[Piece] = []
    for index, span in enumerate(context.spans):
        keys, values = context.store.read(layer, laid, index, q)
        if span.parents:
            for token, path in enumerate(_paths(span)):
                at = span.start + token
                places.append(Segment(0, at, at + 1))
                pieces.append(Piece(q[:, :, at : at + 1], keys[None, :, path], values[None, :, path], len(path) - 1))
        else:
            places.append(Segment(0, span.start, span.end))
            pieces.append(Piece(q[:, :, span.start : span.end], keys[None], values[None], span.past))
    return places, pieces


def _paths(span: Span) -> list[list[int]]:
    """For each token of a tree the places of what it sees: the past, its ancestors, itself."""
    paths: list[list[int]] = []
    for token, parent in enumerate(span.parents):
        before = paths[parent] if parent >= 0 else list(range(span.past))
        paths.append([*before, span.past + token])
    return paths


def _assembled(places: Sequence[Segment], outs: list[Tensor], q: Tensor, size: int) -> Tensor:
    """The pieces' (1, H, L, Dv) at their places in (B, T, H, Dv); tokens of no piece give zeros."""
    rows: list[list[Tensor]] = [[] for _ in range(q.shape[0])]
    ends = [0] * q.shape[0]
    dtype = outs[0].dtype if outs else q.dtype
    for place, out in sorted(zip(places, outs, strict=True), key=lambda pair: (pair[0].row, pair[0].start)):
        if not ends[place.row] <= place.start < place.end <= q.shape[2]:
            what = f"segment [{place.start}, {place.end}) of row {place.row}"
            raise ValueError(f"{what} is empty, overlaps another or leaves the row of {q.shape[2]} tokens")
        rows[place.row] += [_zeros(q, place.start - ends[place.row], size, dtype), out.transpose(1, 2)]
        ends[place.row] = place.end
    for row, end in zip(rows, ends, strict=True):
        row.append(_zeros(q, q.shape[2] - end, size, dtype))
    return torch.cat([torch.cat([part for part in row if part.shape[1]], 1) for row in rows])


def _zeros(q: Tensor, length: int, size: int, dtype: torch.dtype) -> Tensor:
    return q.new_zeros(1, length, q.shape[1], size, dtype=dtype)
