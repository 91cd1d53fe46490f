"""Attention over pieces with one order of sums, in plain torch: for exactness where nothing is compiled.

A running softmax (arXiv:2205.14135) over keys in chunks that are counted from the first key of a sequence; queries in
calls of one size. What a query does not see leaves its sums as they are, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmkit.models.ordered import elementwise
from llmkit.models.pieces import Piece, Rule

QUERIES, KEYS = 16, 64
NONE = -1e30
"""A score that weighs nothing beside any other."""


def ordered(pieces: Sequence[Piece], rule: Rule) -> list[Tensor]:
    """Each (1, H, L, Dv); as `eager`, without dropout; what has 16 bits is computed in fp32."""
    return [_piece(piece, rule).to(piece.q.dtype) for piece in pieces]


def _piece(piece: Piece, rule: Rule) -> Tensor:
    length, groups = piece.q.shape[2], piece.q.shape[1] // piece.k.shape[1]
    wide = torch.promote_types(piece.q.dtype, torch.float32)
    keys, values = (
        [
            part.contiguous()  # a product's order may depend on how its input lies
            for part in pad(x.to(wide), (0, 0, 0, -x.shape[2] % KEYS)).repeat_interleave(groups, 1).split(KEYS, 2)
        ]
        for x in (piece.k, piece.v)
    )
    outs = []
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        q = pad(piece.q[:, :, start:end].to(wide), (0, 0, 0, QUERIES - (end - start)))
        seen = -(-(piece.before + end) // KEYS)  # chunks of keys
        outs.append(_rows(q, keys[:seen], values[:seen], piece.before + start, rule)[:, :, : end - start])
    return torch.cat(outs, 2)


def _rows(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], at: int, rule: Rule) -> Tensor:
    """Queries (1, H, 16, D), of which the first is at place `at`, over chunks of keys from place 0 on."""
    places = torch.arange(at, at + QUERIES, device=q.device)[:, None]
    most, mass = q.new_full((*q.shape[:3], 1), NONE), q.new_zeros(*q.shape[:3], 1)
    total = q.new_zeros(*q.shape[:3], values[0].shape[3])
    for chunk, (k, v) in enumerate(zip(keys, values, strict=True)):
        there = torch.arange(chunk * KEYS, (chunk + 1) * KEYS, device=q.device)[None]
        sees = there <= places
        if rule.window:
            sees &= there > places - rule.window
        scores = (q @ k.transpose(2, 3)) * rule.scale
        if rule.cap:
            scores = elementwise(torch.tanh, scores / rule.cap) * rule.cap
        scores = scores.masked_fill(~sees, NONE)
        higher = torch.maximum(most, scores.amax(-1, keepdim=True))
        weights = elementwise(torch.exp, scores - higher) * sees
        kept = elementwise(torch.exp, most - higher)
        mass = mass * kept + weights.sum(-1, keepdim=True)
        total = total * kept + weights @ v
        most = higher
    if rule.sinks is None:
        return total / mass
    sinks = rule.sinks.to(most.dtype).view(1, -1, 1, 1)
    higher = torch.maximum(most, sinks)
    kept = elementwise(torch.exp, most - higher)
    return total * kept / (mass * kept + elementwise(torch.exp, sinks - higher))
