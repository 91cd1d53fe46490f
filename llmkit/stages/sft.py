"""`kind: sft`: supervised fine-tuning of an adapter or of every weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmkit.core.config import config
from llmkit.losses.node import CrossEntropy, TokenLoss
from llmkit.stages.training import Training

if TYPE_CHECKING:
    from llmkit.data.prepare import Prepared
    from llmkit.parallel.steps import Loss


@config
class Sft(Training):
    """Supervised fine-tuning."""

    kind: Literal["sft"] = "sft"
    loss: TokenLoss = CrossEntropy()
    """What is made small, over the tokens that count."""

    def objective(self, train: Prepared) -> Loss:
        """The loss, which is its own node."""
        return self.loss
