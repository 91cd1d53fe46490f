"""The losses of what learns to draft, over its law q and the model's law p of the same words."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_entropy(logits: Tensor, law: Tensor) -> tuple[Tensor, Tensor]:
    """-sum p log q (N,), and its gradient q - p (N, V) by the logits of q (N, V)."""
    q = torch.log_softmax(logits, 1)
    losses = -(law * q).sum(1)
    return losses, q.exp_().sub_(law)


def overlap(logits: Tensor, law: Tensor) -> tuple[Tensor, Tensor]:
    """-log sum min(p, q) (N,): of how often a draft is kept; and its gradient (N, V) by the logits of q (N, V)."""
    q = torch.softmax(logits, 1)
    common = torch.minimum(q, law).sum(1, keepdim=True).clamp_min(1e-12)
    mine = torch.where(q < law, q, 0.0)  # where the overlap ends with q, it grows with it
    return -common.log()[:, 0], q.mul_(mine.sum(1, keepdim=True)).sub_(mine).div_(common)
