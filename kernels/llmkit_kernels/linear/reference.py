"""What `linear` means, in plain torch."""

from __future__ import annotations

from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in), weight (out, in), bias (out) -> (N, out)."""
    made = x @ weight.T
    return made if bias is None else made + bias
