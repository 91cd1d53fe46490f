"""The `loss` union of reward models: over pairs of answers, or over the steps of solutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmkit.core.config import config, setting
from llmkit.losses.node import ClassEntropy, Focal

if TYPE_CHECKING:
    from torch import Tensor

    from llmkit.core.types import Batch, LossSum


@config
class BradleyTerry:
    """-log sigmoid(r+ - r- - margin) of the scores of a chosen and a rejected answer (Bradley and Terry 1952; with
    margins Llama 2, arXiv:2307.09288). The margin is the rows' column `margin`, 0 where there is none."""

    kind: Literal["bradley_terry"] = "bradley_terry"
    label_smoothing: float = setting(default=0.0, least=0.0, below=0.5)
    """How often a pair is thought to be the wrong way round: its loss is then that of the pair swapped, so that the
    whole is (1 - e) L(r+ - r-) + e L(r- - r+). Where rows have a `probability`, each pair has an e of its own."""
    center: float = setting(default=0.0, least=0.0)
    """Factor on (r+ + r-)^2, which holds scores near 0 (arXiv:2312.09244): 0.01. Without it nothing says where 0 is."""

    def __call__(self, scores: Tensor, batch: Batch) -> LossSum:
        """The sum over pairs, and their number."""
        from llmkit.losses.reward import bradley_terry

        return bradley_terry(scores, batch, self.label_smoothing, self.center)


StepLoss = ClassEntropy | Focal
RewardLoss = BradleyTerry | ClassEntropy | Focal
