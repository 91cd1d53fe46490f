"""Losses over the log-probabilities of single tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmkit.core.types import LossSum


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-likelihood of the chosen tokens, weighted."""

    def __call__(self, logps_N: Tensor, weights_N: Tensor) -> LossSum:
        """The sum of -w log p, and the sum of w."""
        return LossSum(total=-(logps_N * weights_N).sum(), count=weights_N.sum())
