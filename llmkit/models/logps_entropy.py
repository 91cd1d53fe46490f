"""Log-probabilities with the entropies of the laws that they are of, for losses over policies.

With final logits z, the law p and its entropy H = lse - sum p z: dH / dz = -p (z - sum p z). A frozen head makes the
sum p z on the one walk over the vocabulary that `logps.py` makes, at no product more; where the entropies have a
gradient, sum p z W comes with it: a third product of (N, H, V). A trained head makes its logits again in the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit.core.matmul import linear, through
from llmkit.core.types import Entropic
from llmkit.models.logits import Shape, slices
from llmkit.models.logps import BLOCK, computed_in
from llmkit.models.logps_trained import Again, chunk_of


def entropy_of(logps: Tensor) -> Tensor:
    """The entropy of each row of log-probabilities (N, V): (N,)."""
    return -(logps.exp() * logps).sum(1)


def plain_entropic(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shape: Shape) -> Entropic:
    """The twin that defines `entropic_scores`."""
    logps = torch.log_softmax(shape.apply(_raw(hidden, weight, bias)), 1)
    return Entropic(logps.gather(1, labels[:, None])[:, 0], entropy_of(logps))


def _raw(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own product, in fp32 at least."""
    made = torch.nn.functional.linear(hidden, weight, bias)
    return made.to(torch.promote_types(made.dtype, torch.float32))


def entropic_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    trained: bool,
    shape: Shape = Shape(),
    block: tuple[int, int] | None = None,
) -> Entropic:
    """`Entropic` of `labels` (N,) after `hidden` (N, H) under the head `weight` (V, H); `trained`: the entropies have a
    gradient; `block` as in `logps.chosen_logps`."""
    device, grad = hidden.device.type, torch.is_grad_enabled()
    again = weight.requires_grad or (bias is not None and bias.requires_grad)
    hidden, weight, bias = computed_in(hidden, weight, bias)
    rows, columns = block or BLOCK[device]
    with torch.autocast(device, enabled=False):
        if again:  # without gradients too: the same sums in the same order, so that what is the same law is equal
            chunk = chunk_of(hidden, weight, rows)
            logps, entropy = cast(Any, _Trained).apply(hidden, weight, bias, labels, shape, chunk)
        else:
            given = (hidden, weight, bias, labels, shape, (rows, columns), grad, trained)
            logps, entropy = cast(Any, _Frozen).apply(*given)
    return Entropic(logps, entropy if trained else entropy.detach())


class _Walk(NamedTuple):
    """What a walk over the vocabulary gives for some rows; z are final logits, p the law, W the head."""

    logps: Tensor
    entropy: Tensor
    picked: Tensor
    """The label's logit."""
    spread: Tensor | None
    """sum p z' W, (N, H): the gradient of the normaliser."""
    bent: Tensor | None
    """The gradient of the entropy, (N, H)."""


def _walked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    shape: Shape,
    words: int,
    grad: bool,
    trained: bool,
) -> _Walk:
    """Sums of e^d, e^d d, e^d z' W and e^d d z' W, where d is how far z is below the highest so far: sums of z itself
    would cancel."""
    high = hidden.new_full((len(labels),), torch.finfo(torch.float32).min, dtype=torch.float32)
    mass, picked, sums = torch.zeros_like(high), torch.zeros_like(high), torch.zeros_like(high)
    spread = hidden.new_zeros(hidden.shape, dtype=torch.float32) if grad else None
    bent = torch.zeros_like(spread) if spread is not None and trained else None
    for part in slices(len(weight), words):
        logits = shape.apply(linear(hidden, weight[part], None if bias is None else bias[part]).float())
        inside = (labels - part.start).clamp(0, logits.shape[1] - 1)
        here = (labels >= part.start) & (labels < part.stop)
        picked = torch.where(here, logits.gather(1, inside[:, None])[:, 0], picked)
        before, high = high, torch.maximum(high, logits.amax(1))
        slope, below = shape.slope(logits), logits.sub_(high[:, None])
        chances, fall = below.exp(), before - high
        shrink = fall.exp()
        sums.add_(fall * mass).mul_(shrink).add_(torch.linalg.vecdot(chances, below))
        mass.mul_(shrink).add_(chances.sum(1))
        if spread is None:
            continue
        chances = chances if slope is None else chances.mul_(slope)
        if bent is not None:
            bent.add_(fall[:, None] * spread).mul_(shrink[:, None])
            bent.add_(through(below.mul_(chances).to(weight.dtype), weight[part]))
        spread.mul_(shrink[:, None]).add_(through(chances.to(weight.dtype), weight[part]))
    mean = sums.div_(mass)
    if spread is not None:
        spread.mul_((shape.scale / mass)[:, None])
    if bent is not None and spread is not None:
        bent.mul_((-shape.scale / mass)[:, None]).add_(spread * mean[:, None])
    size = mass.log_()
    return _Walk(picked - high - size, size - mean, picked, spread, bent)


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
        trained: bool,
    ) -> tuple[Tensor, Tensor]:
        grad = grad and ctx.needs_input_grad[0]
        logps, entropy = (torch.empty(len(labels), device=hidden.device) for _ in range(2))
        by_logp = torch.empty_like(hidden) if grad else None
        by_entropy = torch.empty_like(hidden) if grad and trained else None
        for rows in slices(len(labels), block[0]):
            made = _walked(hidden[rows], weight, bias, labels[rows], shape, block[1], grad, trained)
            logps[rows], entropy[rows] = made.logps, made.entropy
            if by_logp is not None and made.spread is not None:
                slope = shape.slope(made.picked)
                at = torch.full_like(made.picked, shape.scale) if slope is None else slope * shape.scale
                by_logp[rows] = weight[labels[rows]] * at[:, None].to(weight.dtype) - made.spread.to(weight.dtype)
                if by_entropy is not None and made.bent is not None:
                    by_entropy[rows] = made.bent.to(weight.dtype)
        ctx.save_for_backward(by_logp, by_entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_logp: Tensor, to_entropy: Tensor) -> tuple[Tensor | None, ...]:
        by_logp, by_entropy = ctx.saved_tensors
        if by_logp is None:
            return (None,) * 8
        grad = by_logp * to_logp[:, None].to(by_logp.dtype)
        if by_entropy is not None:
            grad += by_entropy * to_entropy[:, None].to(by_entropy.dtype)
        return (grad, *[None] * 7)


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shape: Shape,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        logps, lse, entropy = (torch.empty(len(labels), device=hidden.device) for _ in range(3))
        for rows in slices(len(labels), chunk):
            logits = shape.apply(linear(hidden[rows], weight, bias).float())
            lse[rows] = torch.logsumexp(logits, 1)
            logps[rows] = logits.gather(1, labels[rows, None])[:, 0] - lse[rows]
            entropy[rows] = entropy_of(logits.sub_(lse[rows, None]))
        ctx.shape, ctx.chunk = shape, chunk
        ctx.save_for_backward(hidden, weight, bias, labels, lse, entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_logp: Tensor, to_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse, entropy = ctx.saved_tensors
        again = Again(hidden, weight, bias, ctx.shape, ctx.needs_input_grad[0])
        for rows in slices(len(labels), ctx.chunk):
            logits, slope = again.logits(rows)
            logps = logits.sub_(lse[rows, None])
            bent = (logps + entropy[rows, None]).mul_(to_entropy[rows, None]).add_(to_logp[rows, None])
            factors = logps.exp_().mul_(bent).neg_()
            factors.scatter_add_(1, labels[rows, None], to_logp[rows, None])
            again.add(rows, factors, slope)
        return (*again.made(), *[None] * 3)
