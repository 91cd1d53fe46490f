"""`kind: sft`: supervised fine-tuning of an adapter or of every weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmkit.core.config import config
from llmkit.stages.training import Training

if TYPE_CHECKING:
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run


@config
class Sft(Training):
    """Supervised fine-tuning."""

    kind: Literal["sft"] = "sft"

    def run(self, run: Run) -> Artifact:
        """Trains, evaluates before and after, and leaves `model/`, the manifest and the report in the run's folder."""
        from llmkit.stages.build_training import train

        return train(self, run)
