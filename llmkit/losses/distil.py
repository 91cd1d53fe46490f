"""The losses of a small model beside its teacher, over its law q and the teacher's law p of all words."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit.losses.drafting import overlap

__all__ = ["forward_kl", "overlap"]


def forward_kl(logits: Tensor, law: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p, q) = sum p (log p - log q) (N,), and its gradient q - p (N, V) by the logits of q (N, V)."""
    q = torch.log_softmax(logits, 1)
    losses = torch.nn.functional.kl_div(q, law, reduction="none").sum(1)
    return losses, q.exp_().sub_(law)
