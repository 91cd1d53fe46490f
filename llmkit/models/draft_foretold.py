"""How near a head's law over its vocabulary is to the model's: a sum over rows whose gradient is made with it, block by
block, so that no more than a block of logits is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

ROWS = 512
"""Of a block."""

Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits (N, V) and the model's law (N, V) -> a loss (N,) and its gradient (N, V) by the logits."""


class Foretold(Function):
    """sum w loss(hidden weight^T, law) over rows; beside it what both laws have in common, and the likeliest word."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, laws: Tensor, at: Tensor, weights: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`hidden` (N, H), `weight` (V, H), `laws` (M, V) of which `at` (N,) are those of the rows, `weights` (N,).

        Gives the sum, sum min(p, q) of each row (N,) and its likeliest word of the draft vocabulary (N,).
        """
        kind = hidden.device.type
        short = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            return _foretold(ctx, hidden, weight, laws, at, weights, rule, short)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Both were made with the sum."""
        to_hidden, to_weight = ctx.saved_tensors
        return grads[0] * to_hidden, grads[0] * to_weight, None, None, None, None


def _foretold(
    ctx: Any, hidden: Tensor, weight: Tensor, laws: Tensor, at: Tensor, weights: Tensor, rule: Rule, short: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Products are of numbers of the type `short`; laws are compared in the type that came."""
    learns = any(ctx.needs_input_grad[:2])
    to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight) if learns else weight
    total, common, best = hidden.new_zeros(()), hidden.new_empty(len(hidden)), torch.empty_like(at)
    words = weight.to(short)
    for start in range(0, len(hidden), ROWS):
        here = slice(start, start + ROWS)
        rows = hidden[here].to(short)
        logits, law = (rows @ words.T).to(hidden.dtype), laws[at[here]]
        losses, slope = rule(logits, law)
        total += (losses * weights[here]).sum()
        common[here] = torch.minimum(torch.softmax(logits, 1), law).sum(1)
        best[here] = logits.argmax(1)
        if learns:
            slope = slope.mul_(weights[here, None]).to(short)
            to_hidden[here] = (slope @ words).to(hidden.dtype)
            _add(to_weight, slope, rows)
    if learns:
        ctx.save_for_backward(to_hidden, to_weight)
    ctx.mark_non_differentiable(common, best)
    return total, common, best


def _add(to_weight: Tensor, slope: Tensor, rows: Tensor) -> None:
    """Adds slope^T rows, which lie in a type of their own."""
    if rows.dtype == to_weight.dtype:
        to_weight.addmm_(slope.T, rows)
    else:
        to_weight += slope.T @ rows
