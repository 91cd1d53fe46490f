"""How near a head's law over its vocabulary is to the model's: a sum over rows whose gradient is made with it, block by
block, so that no more than a block of logits is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

ROWS = 256
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
        learns = any(ctx.needs_input_grad[:2])
        to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight) if learns else weight
        total, common, best = hidden.new_zeros(()), hidden.new_empty(len(hidden)), torch.empty_like(at)
        for start in range(0, len(hidden), ROWS):
            here = slice(start, start + ROWS)
            logits, law = hidden[here] @ weight.T, laws[at[here]]
            losses, slope = rule(logits, law)
            total += (losses * weights[here]).sum()
            common[here] = torch.minimum(torch.softmax(logits, 1), law).sum(1)
            best[here] = logits.argmax(1)
            if learns:
                slope *= weights[here, None]
                torch.mm(slope, weight, out=to_hidden[here])
                to_weight.addmm_(slope.T, hidden[here])
        if learns:
            ctx.save_for_backward(to_hidden, to_weight)
        ctx.mark_non_differentiable(common, best)
        return total, common, best

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Both were made with the sum."""
        to_hidden, to_weight = ctx.saved_tensors
        return grads[0] * to_hidden, grads[0] * to_weight, None, None, None, None
