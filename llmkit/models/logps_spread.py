"""Log-probabilities with the log of the softmax's normaliser and their mean over the vocabulary, for losses that ask.

A frozen head makes the gradients of all three on the one walk over the vocabulary that `logps.py` makes: the mean of
the logits is linear in the hidden states unless they are capped. A trained head makes its logits again in the backward
pass, where the loss's factors on all three are known: four products of (N, H, V).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit.core.matmul import linear
from llmkit.core.types import Scores
from llmkit.models.logits import Shape, slices
from llmkit.models.logps import BLOCK, computed_in, walked
from llmkit.models.logps_trained import Again, chunk_of


def spread_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    words: int,
    shape: Shape = Shape(),
    block: tuple[int, int] | None = None,
) -> Scores:
    """`Scores` of `labels` (N,) after `hidden` (N, H) under the head `weight` (V, H), whose first `words` rows are the
    tokenizer's; `block` as in `logps.chosen_logps`."""
    device, grad = hidden.device.type, torch.is_grad_enabled()
    hidden, weight, bias = computed_in(hidden, weight, bias)
    (rows, columns), words = block or BLOCK[device], min(words, len(weight))
    with torch.autocast(device, enabled=False):
        if grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            chunk = chunk_of(hidden, weight, rows)
            made = cast(Any, _Trained).apply(hidden, weight, bias, labels, words, shape, chunk)
        else:
            made = cast(Any, _Frozen).apply(hidden, weight, bias, labels, words, shape, (rows, columns), grad)
    return Scores(*made)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        words: int,
        shape: Shape,
        block: tuple[int, int],
        grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad = grad and ctx.needs_input_grad[0]
        logps, lse, mean, at_label = (torch.empty(len(labels), device=hidden.device) for _ in range(4))
        spread = torch.empty_like(hidden) if grad else None
        even = torch.empty_like(hidden) if grad and shape.cap else None
        if grad and not shape.cap:
            even = (weight[:words].sum(0, dtype=torch.float32) * shape.scale).to(hidden.dtype)
        for rows in slices(len(labels), block[0]):
            made = walked(hidden[rows], weight, bias, labels[rows], shape, block[1], grad, words)
            logps[rows], lse[rows] = made.logps, made.lse
            mean[rows] = cast(Tensor, made.total) / words - made.lse
            at_label[rows] = made.at_label(shape)
            if spread is not None and made.spread is not None:
                spread[rows] = made.spread.to(spread.dtype)
            if made.even is not None and even is not None:
                even[rows] = made.even.to(even.dtype)
        ctx.words = words
        ctx.save_for_backward(weight, labels, at_label, spread, even)
        return logps, lse, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logp: Tensor, by_lse: Tensor, by_mean: Tensor) -> tuple[Tensor | None, ...]:
        weight, labels, at_label, spread, even = ctx.saved_tensors
        if spread is None:
            return (None,) * 8
        kind = spread.dtype
        grad = weight[labels] * (by_logp * at_label)[:, None].to(kind)
        grad += spread * (by_lse - by_logp - by_mean)[:, None].to(kind)
        grad += even * (by_mean / ctx.words)[:, None].to(kind)
        return (grad, *[None] * 7)


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        words: int,
        shape: Shape,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logps, lse, mean = (torch.empty(len(labels), device=hidden.device) for _ in range(3))
        for rows in slices(len(labels), chunk):
            logits = shape.apply(linear(hidden[rows], weight, bias).float())
            lse[rows] = torch.logsumexp(logits, 1)
            logps[rows] = logits.gather(1, labels[rows, None])[:, 0] - lse[rows]
            mean[rows] = logits[:, :words].mean(1) - lse[rows]
        ctx.words, ctx.shape, ctx.chunk = words, shape, chunk
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        return logps, lse, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logp: Tensor, by_lse: Tensor, by_mean: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        again, words = Again(hidden, weight, bias, ctx.shape, ctx.needs_input_grad[0]), ctx.words
        by_all = by_lse - by_logp - by_mean
        for rows in slices(len(labels), ctx.chunk):
            logits, slope = again.logits(rows)
            factors = logits.sub_(lse[rows, None]).exp_().mul_(by_all[rows, None])
            factors[:, :words] += (by_mean[rows] / words)[:, None]
            factors.scatter_add_(1, labels[rows, None], by_logp[rows, None])
            again.add(rows, factors, slope)
        return (*again.made(), *[None] * 4)
