"""What `silu_mul` means, in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Two tensors of one shape -> silu(gate) * up."""
    return silu(gate) * up
