"""What compiled rows read as it lies."""

from __future__ import annotations

import torch
from torch import Tensor


def fp32(x: Tensor) -> bool:
    """Whether a tensor is fp32 on a CPU."""
    return x.is_cpu and x.dtype is torch.float32


def flat(x: Tensor) -> bool:
    """Whether it is, and its numbers lie end to end."""
    return fp32(x) and x.is_contiguous()
