"""The `loss` union of a head that drafts: over the laws of several drafts in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from llmkit.core.config import config, setting
from llmkit.core.types import Drafted, LossSum

if TYPE_CHECKING:
    from torch import Tensor

    from llmkit.core.types import Batch

    Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def together(drafted: Drafted, decay: float, count: Tensor) -> LossSum:
    """The losses of steps 0, 1, ... with weights 1, decay, ... that come to 1 together; beside it how often a draft of
    each step is kept."""
    shares = [decay**step for step in range(len(drafted.losses))]
    first, *others = (share * loss / sum(shares) for share, loss in zip(shares, drafted.losses, strict=True))
    total = sum(others, start=first)
    pairs = zip(drafted.kept, drafted.counts, strict=True)
    kept = {f"kept_{step}": (top, bottom.clamp_min(1e-9)) for step, (top, bottom) in enumerate(pairs, 1)}
    return LossSum(total, count, kept)


@config
class SoftEntropy:
    """Cross-entropy to the model's law over the draft vocabulary (EAGLE-3, arXiv:2503.01840)."""

    kind: Literal["soft_entropy"] = "soft_entropy"
    decay: float = setting(default=0.8, above=0.0, most=1.0)
    """What the loss of each further draft counts, as a share of that of the one before."""

    @property
    def rule(self) -> Rule:
        """Loss and gradient of rows."""
        from llmkit.losses.drafting import soft_entropy

        return soft_entropy

    def __call__(self, scores: Drafted, batch: Batch) -> LossSum:
        """The sum over all drafts that have a weight."""
        return together(scores, self.decay, batch.weights.sum())


@config
class Overlap:
    """-log sum min(p, q): of how often a draft that is drawn is kept (the LK loss)."""

    kind: Literal["overlap"] = "overlap"
    decay: float = setting(default=0.8, above=0.0, most=1.0)
    """What the loss of each further draft counts, as a share of that of the one before."""

    @property
    def rule(self) -> Rule:
        """Loss and gradient of rows."""
        from llmkit.losses.drafting import overlap

        return overlap

    def __call__(self, scores: Drafted, batch: Batch) -> LossSum:
        """The sum over all drafts that have a weight."""
        return together(scores, self.decay, batch.weights.sum())


DraftLoss = SoftEntropy | Overlap
