"""The recipe's `loss` node of stages that learn to predict tokens: a sum over tokens with its count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from llmkit.core.config import config, setting
from llmkit.core.types import LossSum, Needs, Scores

if TYPE_CHECKING:
    from torch import Tensor

    from llmkit.core.types import Batch


@config
class CrossEntropy:
    """Negative log-likelihood of the tokens that count."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = setting(default=0.0, least=0.0, below=1.0)
    """Share of the target that is spread evenly over the tokenizer's words (arXiv:1512.00567); perplexities of smoothed
    and plain training cannot be compared, so the plain loss is logged as `nll`."""
    z_loss: float = setting(default=0.0, least=0.0)
    """Factor on the square of the log of the softmax's normaliser, which holds it near 0 (arXiv:2204.02311): 1e-4."""

    @property
    def needs(self) -> Needs:
        """What it reads of the head."""
        return Needs(spread=bool(self.label_smoothing or self.z_loss))

    def __call__(self, scores: Tensor | Scores, batch: Batch) -> LossSum:
        """The sum of w (-(1 - e) log p - e mean log p + z lse^2) over the tokens that have a weight, and of w."""
        weights_N = batch.weights[batch.weights != 0]
        if not isinstance(scores, Scores):
            return LossSum(total=-(scores * weights_N).sum(), count=weights_N.sum())
        share, count = self.label_smoothing, weights_N.sum()
        each_N = (1 - share) * scores.logps + share * scores.mean - self.z_loss * scores.lse.square()
        nll = -(scores.logps.detach() * weights_N).sum()
        return LossSum(total=-(each_N * weights_N).sum(), count=count, extras={"nll": (nll, count)})


@config
class Dft:
    """Dynamic fine-tuning (arXiv:2508.05629): a token's loss counts as much as the model believes in it already."""

    kind: Literal["dft"] = "dft"

    @property
    def needs(self) -> Needs:
        """What it reads of the head."""
        return Needs(by_weight=False)

    def __call__(self, scores: Tensor | Scores, batch: Batch) -> LossSum:
        """The sum of -w p log p with p held fixed, and the sum of w."""
        logps_N, weights_N = cast("Tensor", scores), batch.weights[batch.weights != 0]
        count = weights_N.sum()
        nll = -(logps_N.detach() * weights_N).sum()
        return LossSum(-(logps_N.detach().exp() * logps_N * weights_N).sum(), count, {"nll": (nll, count)})


TokenLoss = CrossEntropy | Dft
