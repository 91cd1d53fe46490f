"""A row of trees for kinds of attention that take keys end to end: each segment's are its ancestors' and its own.

They are brought together in one operation, and the gradients of what several segments see are added up in one order:
cut and put together segment by segment, a layer of a small model takes a GPU's host longer than its products take the
GPU (benchmarks/LOG.md). T tokens of a row have L keys in all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit.core.types import Segment


class Laid(NamedTuple):
    """Where a row's tokens lie among the keys."""

    lengths: tuple[int, ...]
    """Of each segment its tokens,"""
    keys: tuple[int, ...]
    """and its keys."""
    of: Tensor
    """(L,): which token each key is of."""
    own: Tensor
    """(T,): where each token's key lies in its own segment."""
    seen: Tensor
    """(P,): the tokens that other segments see too."""
    there: Tensor
    """(P, M): where their keys lie in those, L where they lie in fewer."""


def laid(segments: tuple[Segment, ...], shape: tuple[int, ...], device: torch.device) -> Laid | None:
    """Of queries (1, H, T, D) whose row is these segments end to end; nothing of another one."""
    return _laid(segments, shape[2], device) if shape[0] == 1 else None


@lru_cache(maxsize=8)  # once for all layers
def _laid(segments: tuple[Segment, ...], tokens: int, device: torch.device) -> Laid | None:
    at = 0
    for segment in segments:
        if segment.row or not at == segment.start < segment.end:
            return None
        at = segment.end
    if at != tokens:
        return None
    paths: list[list[int]] = []
    for index, segment in enumerate(segments):
        if segment.parent >= index:
            raise ValueError(f"segment {index} has parent {segment.parent}, which is not an earlier segment")
        before = paths[segment.parent] if segment.parent >= 0 else []
        paths.append([*before, *range(segment.start, segment.end)])
    of = [token for path in paths for token in path]
    places: list[list[int]] = [[] for _ in range(tokens)]
    for place, token in enumerate(of):
        places[token].append(place)  # the first is that in its own segment: who sees it comes later
    seen = [token for token, held in enumerate(places) if len(held) > 1]
    most = max((len(places[token]) - 1 for token in seen), default=0)
    there = [places[token][1:] + [len(of)] * (most + 1 - len(places[token])) for token in seen]

    def there_is(held: Any) -> Tensor:
        return torch.tensor(held, dtype=torch.int64, device=device)

    lengths = tuple(segment.end - segment.start for segment in segments)
    own, table = there_is([held[0] for held in places]), there_is(there).view(len(seen), most)
    return Laid(lengths, tuple(map(len, paths)), there_is(of), own, there_is(seen), table)


def brought(rows: Tensor, laid: Laid) -> Tensor:
    """(T, KV, D) -> (L, KV, D): of each segment its ancestors' and its own."""
    return cast(Tensor, cast(Any, _Brought).apply(rows, laid))


class _Brought(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, laid: Laid) -> Tensor:
        ctx.laid = laid
        return rows.index_select(0, laid.of)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        laid: Laid = ctx.laid
        made = grad.index_select(0, laid.own)
        if len(laid.seen):
            padded = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])
            others = padded[laid.there].sum(1, dtype=torch.promote_types(grad.dtype, torch.float32))
            made[laid.seen] = (others + made[laid.seen]).to(grad.dtype)
        return made, None
