"""Log-probabilities of chosen tokens without the logits of all positions.

N positions are chosen (those with weight), V is the vocabulary, H the hidden size. The vocabulary is walked block by
block under a running softmax (the online softmax of arXiv 1805.02867), so that one block of logits exists at a time and
stays in the cache. Because the log-probability of a token depends on its own hidden state alone, its gradient
`d logp_n / d hidden_n = W[label_n] - softmax_n W` is summed on the same walk: the head costs two products of (N, H, V)
with a frozen weight. A trained weight takes `logps_trained.py`, which costs three.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmkit.core.matmul import linear, through
from llmkit.core.types import Scores
from llmkit.models.logits import Shape, slices
from llmkit.models.logps_trained import trained_logps

BLOCK = {"cpu": (1024, 2048), "cuda": (4096, 16384)}
"""Positions and words of one block of logits: on a CPU what a core's cache holds, on a GPU what keeps it busy."""


def plain_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shape: Shape) -> Tensor:
    """The twin that defines `chosen_logps`: dense logits, log-softmax, pick."""
    logits = shape.apply(nn.functional.linear(hidden, weight, bias).float())
    return torch.log_softmax(logits, 1).gather(1, labels[:, None])[:, 0]


def plain_scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shape: Shape, words: int
) -> Scores:
    """The twin that defines `logps_spread.spread_scores`; `words` rows of the vocabulary are the tokenizer's."""
    logits = shape.apply(nn.functional.linear(hidden, weight, bias).float())
    spread = torch.log_softmax(logits, 1)
    picked = spread.gather(1, labels[:, None])[:, 0]
    return Scores(picked, torch.logsumexp(logits, 1), spread[:, :words].mean(1))


def chosen_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = None,
    shape: Shape = Shape(),
    block: tuple[int, int] | None = None,
) -> Tensor:
    """Log-probabilities of `labels` (N,) after `hidden` (N, H) under the head `weight` (V, H): (N,), fp32.

    `weights` (N,) says what the loss will multiply each with, up to one common factor: it spares a trained head a
    product. `block` is the positions and the words of the largest block of logits.
    """
    device, grad = hidden.device.type, torch.is_grad_enabled()
    hidden, weight, bias = computed_in(hidden, weight, bias)
    rows, words = block or BLOCK[device]
    with torch.autocast(device, enabled=False):
        if grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            return trained_logps(hidden, weight, bias, labels, weights, shape, rows)
        return cast(Tensor, cast(Any, _Frozen).apply(hidden, weight, bias, labels, shape, (rows, words), grad))


def computed_in(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """All three in the type that their product is made in: autocast's, or the weight's."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
        weight, bias = weight.to(kind), None if bias is None else bias.to(kind)
    return hidden.to(weight.dtype), weight, bias


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shape: Shape,
        block: tuple[int, int],
        grad: bool,
    ) -> Tensor:
        to_hidden = torch.empty_like(hidden) if grad and ctx.needs_input_grad[0] else None
        logps = torch.empty(len(labels), device=hidden.device)
        for rows in slices(len(labels), block[0]):
            made = walked(hidden[rows], weight, bias, labels[rows], shape, block[1], to_hidden is not None)
            logps[rows] = made.logps
            if to_hidden is not None and made.spread is not None:
                to_hidden[rows] = (weight[labels[rows]] * made.at_label(shape)[:, None]).sub_(made.spread)
        ctx.save_for_backward(to_hidden)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (to_hidden,) = ctx.saved_tensors
        return (None if to_hidden is None else to_hidden * grad[:, None].to(to_hidden.dtype), *[None] * 6)


class Walk(NamedTuple):
    """What a walk over the vocabulary gives for some rows."""

    logps: Tensor
    lse: Tensor
    picked: Tensor
    """The label's logit."""
    spread: Tensor | None
    """The gradient of `lse`, (N, H), in fp32."""
    total: Tensor | None
    """The sum of the logits of the first `real` words."""
    even: Tensor | None
    """The gradient of `total`, (N, H), in fp32, where it is not one vector for all rows."""

    def at_label(self, shape: Shape) -> Tensor:
        """The factor of the label's row of the weight in the gradient of its logit."""
        slope = shape.slope(self.picked)
        return torch.full_like(self.picked, shape.scale) if slope is None else slope * shape.scale


def walked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    shape: Shape,
    words: int,
    grad: bool,
    real: int = 0,
) -> Walk:
    """Some rows against all words, `words` at a time; `grad` asks for the gradients of their hidden states too."""
    high = hidden.new_full((len(labels),), torch.finfo(torch.float32).min, dtype=torch.float32)
    mass, picked = torch.zeros_like(high), torch.zeros_like(high)
    total = torch.zeros_like(high) if real else None
    spread = hidden.new_zeros(hidden.shape, dtype=torch.float32) if grad else None
    even = torch.zeros_like(spread) if spread is not None and real and shape.cap else None
    for part, logits in _blocks(hidden, weight, bias, shape, words):
        inside = (labels - part.start).clamp(0, logits.shape[1] - 1)
        here = (labels >= part.start) & (labels < part.stop)
        picked = torch.where(here, logits.gather(1, inside[:, None])[:, 0], picked)
        before, high = high, torch.maximum(high, logits.amax(1))
        slope = shape.slope(logits)
        if total is not None and part.start < real:
            total.add_(logits[:, : real - part.start].sum(1))
            if even is not None and slope is not None:
                kept = slice(part.start, min(part.stop, real))
                even.add_(through(slope[:, : kept.stop - kept.start].to(weight.dtype), weight[kept]))
        shrink = (before - high).exp_()
        chances = logits.sub_(high[:, None]).exp_()
        mass.mul_(shrink).add_(chances.sum(1))
        if spread is not None:
            chances = chances if slope is None else chances.mul_(slope)
            spread.mul_(shrink[:, None]).add_(through(chances.to(weight.dtype), weight[part]))
    if spread is not None:
        spread.mul_((shape.scale / mass)[:, None])
    if even is not None:
        even.mul_(shape.scale)
    size = mass.log_()
    return Walk(picked - high - size, high + size, picked, spread, total, even)


def _blocks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, words: int
) -> Iterator[tuple[slice, Tensor]]:
    """(words, their final logits in fp32), block by block; the logits are the caller's to change."""
    for part in slices(len(weight), words):
        raw = linear(hidden, weight[part], None if bias is None else bias[part]).float()
        yield part, shape.apply(raw)
