"""The losses of a model that learns from another's law of all words: q is its own law, p the other's."""

from __future__ import annotations

from collections.abc import Callable
from math import log, log1p

import torch
from torch import Tensor

from llmkit.losses.drafting import overlap

__all__ = ["Divergence", "coarse", "forward_kl", "jsd", "mixture", "overlap", "reverse_kl"]

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits of q (N, V) and log p (N, V) -> how far they are from each other (N,), and its gradient by the logits."""
Judged = tuple[Tensor, Tensor, Tensor]
"""Of rows: the loss (N,), the negative log-likelihood of the label (N,), the gradient of the loss by the logits."""


def forward_kl(logits: Tensor, law: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p, q) = sum p (log p - log q) (N,), and its gradient q - p (N, V) by the logits of q (N, V); `law` is p."""
    q = torch.log_softmax(logits, 1)
    losses = torch.nn.functional.kl_div(q, law, reduction="none").sum(1)
    return losses, q.exp_().sub_(law)


def reverse_kl(logits: Tensor, log_law: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q, p) = sum q (log q - log p) (N,), and its gradient q (log q - log p - KL) by the logits of q (N, V)."""
    log_q = torch.log_softmax(logits, 1)
    gap, q = log_q - log_law, log_q.exp()
    losses = (q * gap).sum(1)
    return losses, gap.sub_(losses[:, None]).mul_(q)


def jsd(logits: Tensor, log_law: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p, m) + (1 - beta) KL(q, m) of the mixture m = beta p + (1 - beta) q (N,), and its gradient
    (1 - beta) q (log q - log m - KL(q, m)) by the logits of q (N, V) (GKD, arXiv:2306.13649)."""
    log_q = torch.log_softmax(logits, 1)
    mixed = torch.logaddexp(log_q + log1p(-beta), log_law + log(beta))
    own, q = log_q - mixed, log_q.exp()
    ours, theirs = (q * own).sum(1), (log_law.exp() * (log_law - mixed)).sum(1)
    return beta * theirs + (1 - beta) * ours, own.sub_(ours[:, None]).mul_(q).mul_(1 - beta)


def coarse(logits: Tensor, ids: Tensor, log_law: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """A divergence over k words and all others as one: `ids` (N, k) are the words, `log_law` (N, k + 1) what the other
    law gives to them and to the rest. It is at most that of whole laws, and equal where the rest is shared alike.

    Where k is all words, `log_law` is (N, k) and nothing is lost. The gradient (N, V) of the rest goes to its words by
    their shares of it.
    """
    chosen = logits.gather(1, ids)
    if log_law.shape[1] == ids.shape[1]:
        losses, slope = divergence(chosen, log_law)
        return losses, torch.zeros_like(logits).scatter_(1, ids, slope)
    others = logits.scatter(1, ids, -torch.inf)
    rest = torch.logsumexp(others, 1, keepdim=True)
    losses, slope = divergence(torch.cat([chosen, rest], 1), log_law)
    shared = others.sub_(rest).exp_().mul_(slope[:, -1:])
    return losses, shared.scatter_(1, ids, slope[:, :-1].contiguous())


def mixture(
    logits: Tensor,
    labels: Tensor,
    compared: Callable[[Tensor], tuple[Tensor, Tensor]],
    temperature: float = 1.0,
    share: float = 0.0,
) -> Judged:
    """(1 - share) T^2 D(logits / T) + share (-log q[label]), of which `compared` is D with its gradient.

    The factor T^2 keeps the size of D's gradient, which falls with 1 / T^2 (Hinton et al., arXiv:1503.02531).
    """
    losses, slope = compared(logits / temperature)
    log_q = torch.log_softmax(logits, 1)
    nll = -log_q.gather(1, labels[:, None])[:, 0]
    total, slope = losses.mul((1 - share) * temperature**2), slope.mul_((1 - share) * temperature)
    if share:
        total = total + share * nll
        hard = log_q.exp_().mul_(share)
        slope.add_(hard.scatter_add_(1, labels[:, None], hard.new_full((len(labels), 1), -share)))
    return total, nll, slope
