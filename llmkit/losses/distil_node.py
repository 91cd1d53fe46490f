"""The `loss` union of a small model that learns from a larger one's laws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmkit.core.config import config
from llmkit.core.types import Drafted, LossSum
from llmkit.losses.draft_node import together

if TYPE_CHECKING:
    from llmkit.core.types import Batch
    from llmkit.losses.draft_node import Rule


@config
class ForwardKl:
    """KL(p, q) of the teacher's law p to the small model's law q (Hinton et al., arXiv:1503.02531; of drafters,
    DistillSpec, arXiv:2310.08461)."""

    kind: Literal["forward_kl"] = "forward_kl"

    @property
    def rule(self) -> Rule:
        """Loss and gradient of rows."""
        from llmkit.losses.distil import forward_kl

        return forward_kl

    def __call__(self, scores: Drafted, batch: Batch) -> LossSum:
        """The sum over all tokens that have a weight."""
        return together(scores, 1.0, batch.weights.sum())


@config
class KeptShare:
    """-log sum min(p, q): of how often a draft that is drawn is kept."""

    kind: Literal["overlap"] = "overlap"

    @property
    def rule(self) -> Rule:
        """Loss and gradient of rows."""
        from llmkit.losses.distil import overlap

        return overlap

    def __call__(self, scores: Drafted, batch: Batch) -> LossSum:
        """The sum over all tokens that have a weight."""
        return together(scores, 1.0, batch.weights.sum())


DistilLoss = ForwardKl | KeptShare
