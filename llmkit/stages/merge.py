"""`kind: merge`: folds an adapter into its base, behind a gate on the difference of the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmkit.core.config import config, setting
from llmkit.models.node import ModelRef

if TYPE_CHECKING:
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run


@config
class Merge:
    """Fold an adapter into its base and write a plain Hugging Face folder."""

    kind: Literal["merge"] = "merge"
    model: ModelRef
    """An adapter folder or a run's folder."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The type that the merged weights are written in."""
    bound: float | None = setting(default=None, above=0.0)
    """Largest allowed difference of logits, as a share of the largest logit; without it 1e-5 for fp32 and 2e-2 below,
    and for a quantised base the size of its own quantisation error."""
    seed: int = setting(default=0, least=0)
    out: str
    """The run's folder; the merged model is in its `model/`."""

    def run(self, run: Run) -> Artifact:
        """Merges, measures, and publishes `model/` only if the gate passes."""
        from llmkit.stages.build_inference import merge

        return merge(self, run)
