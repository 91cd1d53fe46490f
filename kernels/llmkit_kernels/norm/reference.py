"""What `rms_norm` means, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., size), weight (size) -> (..., size)."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
