"""Attention over a row that several ranks hold, by heads (DeepSpeed-Ulysses, arXiv 2309.14509).

Each of N ranks gives away the heads of its own tokens and gets the tokens of its own heads: H / N heads of the whole
row, which any kind of attention computes. What comes out goes the same way back.
"""

from __future__ import annotations

from math import lcm
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit.core.types import Exchange, Split


def by_heads(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, split: Split
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(1, H, T / N, D) of all heads -> (1, H / N, T, D) of all tokens, and this rank's sinks (H / N,).

    Key-value heads that N does not divide are repeated until it does.

    Raises:
        ValueError: N does not divide the query heads.
    """
    count, heads = split.exchange.count, q.shape[1]
    if heads % count:
        raise ValueError(f"{heads} heads cannot be dealt to {count} ranks")
    again = lcm(k.shape[1], count) // k.shape[1]
    if again > 1:
        k, v = k.repeat_interleave(again, 1), v.repeat_interleave(again, 1)
    if sinks is not None:
        sinks = sinks.chunk(count)[split.exchange.index]
    q, k, v = (_heads(x, split) for x in (q, k, v))
    return q, k, v, sinks


def by_tokens(out: Tensor, split: Split) -> Tensor:
    """(1, T, H / N, D) of all tokens -> (1, T / N, H, D) of all heads."""
    _, tokens, heads, size = out.shape
    count = split.exchange.count
    parts = torch.cat([out[:, a:b] for part in split.held for a, b in part], 1) if _several(split) else out
    swapped = _swapped(parts.view(count, tokens // count, heads, size), split.exchange)
    return swapped.transpose(0, 1).reshape(1, tokens // count, count * heads, size)


def _heads(x: Tensor, split: Split) -> Tensor:
    _, heads, tokens, size = x.shape
    count = split.exchange.count
    swapped = _swapped(x.view(count, heads // count, tokens, size), split.exchange)
    row = swapped.transpose(0, 1).reshape(heads // count, count * tokens, size)
    if _several(split):  # from the order of the ranks to that of the row
        stretches = [stretch for part in split.held for stretch in part]
        parts = zip(stretches, row.split([end - start for start, end in stretches], 1), strict=True)
        row = torch.cat([part for _, part in sorted(parts, key=lambda pair: pair[0])], 1)
    return row[None]


def _several(split: Split) -> bool:
    """Whether the ranks' parts in their order are not the row."""
    return any(len(part) > 1 for part in split.held)


def _swapped(chunks: Tensor, exchange: Exchange) -> Tensor:
    return cast(Tensor, cast(Any, _Swap).apply(chunks, exchange))


class _Swap(torch.autograd.Function):
    """Gradients go back as they came: the chunk from rank i returns to it."""

    @staticmethod
    def forward(ctx: Any, chunks: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.swap(chunks.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.swap(grad.contiguous()), None
