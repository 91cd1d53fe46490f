"""The log-probabilities of chosen tokens under a head that is trained itself, by chunks of positions.

A chunk has its logits over the whole vocabulary, so that the gradients of the hidden states and of the weight are made
in the forward pass while they are there: three products of (N, H, V). For that the forward pass is told what the loss
will multiply each log-probability with, up to one common factor; a backward pass that finds something else recomputes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit.core.matmul import linear, through
from llmkit.models.logits import Shape, slices

CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 256 << 20}
"""Size of a chunk's fp32 logits: smaller ones read the head's weight more often than they compute."""


def trained_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    shape: Shape,
    most: int,
) -> Tensor:
    """As `logps.chosen_logps`, at most `most` positions at a time."""
    chunk = chunk_of(hidden, weight, most)
    return cast(Tensor, cast(Any, _Trained).apply(hidden, weight, bias, labels, weights, shape, chunk))


def chunk_of(hidden: Tensor, weight: Tensor, most: int) -> int:
    """Positions whose logits are made at a time, at most `most`."""
    return min(most, max(16, CHUNK_BYTES[hidden.device.type] // (4 * len(weight))))


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor | None,
        shape: Shape,
        chunk: int,
    ) -> Tensor:
        sums = _Sums(hidden, weight, bias, ctx.needs_input_grad[0], weights is not None)
        logps = [
            sums.add(rows, weight, bias, labels[rows], None if weights is None else weights[rows], shape, hidden)
            for rows in slices(len(labels), chunk)
        ]
        ctx.shape, ctx.chunk = shape, chunk
        ctx.save_for_backward(hidden, weight, bias, labels, weights, sums.hidden, sums.weight, sums.bias)
        return torch.cat(logps) if logps else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, weights, by_hidden, by_weight, by_bias = ctx.saved_tensors
        to_hidden = None if by_hidden is None else by_hidden * grad[:, None].to(by_hidden.dtype)
        factor = None if weights is None else _common_factor(grad, weights)
        if factor is None:
            sums = _Sums(hidden, weight, bias, False, True)
            for rows in slices(len(labels), ctx.chunk):
                sums.add(rows, weight, bias, labels[rows], grad[rows], ctx.shape, hidden)
            by_weight, by_bias, factor = sums.weight, sums.bias, grad.new_ones(())
        to_weight = (by_weight * factor).to(weight.dtype)
        to_bias = None if by_bias is None else (by_bias * factor).to(by_bias.dtype)
        return (to_hidden, to_weight, to_bias, *[None] * 4)


class _Sums:
    """Gradients of sum(weights * logps) as they grow chunk by chunk; those of `hidden` are for weight 1 a row."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, by_hidden: bool, trained: bool) -> None:
        self.hidden = torch.empty_like(hidden) if by_hidden else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if trained else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if trained and bias is not None else None

    def add(
        self,
        rows: slice,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor | None,
        shape: Shape,
        hidden: Tensor,
    ) -> Tensor:
        """One chunk: its log-probabilities, and its part of the gradients."""
        here = hidden[rows]
        logits = shape.apply(linear(here, weight, bias).float())
        slope = shape.slope(logits)
        logits -= logits.amax(1, keepdim=True)
        picked = logits.gather(1, labels[:, None])[:, 0]
        mass = logits.exp_().sum(1)
        at_label = torch.full_like(mass, shape.scale)
        if slope is not None:
            at_label = at_label * slope.gather(1, labels[:, None])[:, 0]
            logits *= slope
        spread = logits.to(weight.dtype)
        per_row = (shape.scale / mass).to(weight.dtype)
        if self.hidden is not None:
            gathered = weight[labels] * at_label[:, None].to(weight.dtype)
            self.hidden[rows] = gathered.sub_(through(spread, weight).mul_(per_row[:, None]))
        if self.weight is not None and weights is not None:
            self._add_trained(spread, per_row, at_label, labels, weights, here)
        return picked - mass.log()

    def _add_trained(
        self, spread: Tensor, per_row: Tensor, at_label: Tensor, labels: Tensor, weights: Tensor, here: Tensor
    ) -> None:
        total, scaled = cast(Tensor, self.weight), (weights * per_row.float()).to(spread.dtype)
        total.index_add_(0, labels, (here * (weights * at_label)[:, None]).float())
        if total.dtype == spread.dtype:
            total.addmm_(spread.T, here * scaled[:, None], alpha=-1)
        else:
            total.sub_((spread.T @ (here * scaled[:, None])).float())
        if self.bias is not None:
            self.bias.index_add_(0, labels, weights * at_label)
            self.bias.sub_((spread.float() * scaled.float()[:, None]).sum(0))


def _common_factor(grad: Tensor, weights: Tensor) -> Tensor | None:
    """The number f with grad = f * weights, or None."""
    if not len(grad):
        return grad.new_zeros(())
    pivot = weights.abs().argmax()
    factor = grad[pivot] / weights[pivot]
    off = (grad - factor * weights).abs().max()
    return factor if bool(off <= 1e-6 * grad.abs().max()) else None


class Again:
    """The gradients of a head whose logits are made again in the backward pass, chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, by_hidden: bool) -> None:
        self.given, self.shape = (hidden, weight, bias), shape
        self.hidden = torch.empty_like(hidden) if by_hidden else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32)
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)

    def logits(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Final logits of some rows, which may be written over, and their slope."""
        hidden, weight, bias = self.given
        logits = self.shape.apply(linear(hidden[rows], weight, bias).float())
        return logits, self.shape.slope(logits)

    def add(self, rows: slice, factors: Tensor, slope: Tensor | None) -> None:
        """The part of rows whose loss has the gradient `factors` by their final logits; it is written over."""
        hidden, weight, _ = self.given
        factors = factors.mul_(self.shape.scale) if slope is None else factors.mul_(slope).mul_(self.shape.scale)
        self.bias = self.bias if self.bias is None else self.bias.add_(factors.sum(0))
        factors = factors.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[rows] = through(factors, weight)
        if self.weight.dtype == factors.dtype:
            self.weight.addmm_(factors.T, hidden[rows])
        else:
            self.weight += (factors.T @ hidden[rows]).float()

    def made(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """By hidden states, by the weight and by the bias, in their types."""
        _, weight, bias = self.given
        by_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return self.hidden, self.weight.to(weight.dtype), by_bias
