"""Losses over the log-probabilities of single tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmkit.core.types import Batch, LossSum


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-likelihood of the chosen tokens, weighted."""

    def __call__(self, logps_N: Tensor, batch: Batch) -> LossSum:
        """The sum of -w log p over the tokens that have a weight, and the sum of w."""
        weights_N = batch.weights[batch.weights != 0]
        return LossSum(total=-(logps_N * weights_N).sum(), count=weights_N.sum())
