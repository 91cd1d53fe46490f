"""`kind: sft`: supervised fine-tuning of an adapter or of every weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmkit.core.config import config
from llmkit.losses.node import CrossEntropy, TokenLoss
from llmkit.stages.training import Training

if TYPE_CHECKING:
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run
    from llmkit.data.prepare import Prepared
    from llmkit.parallel.single import Loss


@config
class Sft(Training):
    """Supervised fine-tuning."""

    kind: Literal["sft"] = "sft"
    loss: TokenLoss = CrossEntropy()
    """What is made small, over the tokens that count."""

    def objective(self, train: Prepared) -> Loss:
        """The loss, which is its own node."""
        return self.loss

    def run(self, run: Run) -> Artifact:
        """Trains, evaluates before and after, and leaves `model/`, the manifest and the report in the run's folder."""
        from llmkit.stages.build_training import train

        return train(self, run)
