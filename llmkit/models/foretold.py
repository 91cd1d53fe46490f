"""How near one law is to another: a sum over rows whose gradients are made with it, block by block, so that no more
than a block of logits is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from llmkit.models.logits import Shape, slices

ROWS = 512
"""Of a block."""

Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits (N, V) and the model's law (N, V) -> a loss (N,) and its gradient (N, V) by the logits."""
Law = Callable[[slice], Tensor]
"""Some of the rows -> the model's law of them, (n, V)."""
Judge = Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]]
"""Logits (n, V) of some of the rows -> a loss (n,), a figure to tell (n,), the loss's gradient (n, V) by the logits."""
Told = tuple[Tensor, Tensor, Tensor]


def kept(law: Law, rule: Rule) -> Judge:
    """A loss by `rule` to the model's law p; its figure is sum min(p, q), how often a draft is kept."""

    def judge(logits: Tensor, here: slice) -> tuple[Tensor, Tensor, Tensor]:
        p = law(here)
        losses, slope = rule(logits, p)
        return losses, torch.minimum(torch.softmax(logits, 1), p).sum(1), slope

    return judge


def foretold(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    judge: Judge,
    weights: Tensor,
    own: Shape = Shape(),
    rows: int = ROWS,
) -> Told:
    """sum w loss(own(hidden weight^T + bias)) over rows; the figure of each row (N,); its likeliest word (N,).

    `hidden` (N, H), `weight` (V, H), `bias` (V,), `weights` (N,); `own`: what the family does to its logits. Under
    autocast products are of numbers of its type; laws are compared in the type of `hidden`.
    """
    if not torch.is_grad_enabled():  # a Function is told of parameters that they learn even then
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    made: Any = _Foretold.apply(hidden, weight, bias, judge, weights, own, rows)  # type: ignore[no-untyped-call]
    return cast(Told, made)


class _Foretold(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, judge: Judge, *how: Any) -> Told:
        kind = hidden.device.type
        short = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        inputs = zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        grads = [torch.zeros_like(x) if x is not None and learns else None for x, learns in inputs]
        with torch.autocast(kind, enabled=False):
            total, figures, best = _walked(short, grads, hidden, weight, bias, judge, *how)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(figures, best)
        return total, figures, best

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """All were made with the sum."""
        return (*(None if made is None else grads[0] * made for made in ctx.saved_tensors), *[None] * 4)


def _walked(
    short: torch.dtype,
    grads: list[Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    judge: Judge,
    weights: Tensor,
    own: Shape,
    rows: int,
) -> Told:
    """Block by block; products are of the type `short`, and `grads` those of hidden, weight and bias that are made."""
    words = weight.to(short)
    total, figures = hidden.new_zeros(()), hidden.new_empty(len(hidden))
    best = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
    for here in slices(len(hidden), rows):
        read = hidden[here].to(short)
        raw = (read @ words.T).to(hidden.dtype)
        logits = own.apply(raw if bias is None else raw + bias)
        losses, figures[here], slope = judge(logits, here)
        total += (losses * weights[here]).sum()
        best[here] = logits.argmax(1)
        if any(made is not None for made in grads):
            slope.mul_(weights[here, None] * own.scale)
            if (bent := own.slope(logits)) is not None:
                slope.mul_(bent)
            _add(grads, here, slope, words, read)
    return total, figures, best


def _add(grads: list[Tensor | None], here: slice, slope: Tensor, words: Tensor, read: Tensor) -> None:
    """The gradients of a block's rows, of the weight and of the bias, of which `slope` (n, V) is that of the logits."""
    to_hidden, to_weight, to_bias = grads
    if to_bias is not None:
        to_bias += slope.sum(0)
    slope = slope.to(words.dtype)
    if to_hidden is not None:
        to_hidden[here] = (slope @ words).to(to_hidden.dtype)
    if to_weight is None:
        return
    if read.dtype == to_weight.dtype:
        to_weight.addmm_(slope.T, read)
    else:
        to_weight += slope.T @ read
