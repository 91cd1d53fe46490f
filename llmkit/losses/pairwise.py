"""A loss of preference over batches: the pairs of a batch, their losses and figures, and the sum of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmkit.core.types import Batch, Entropic, LossSum, Needs, Referenced, Scores
from llmkit.losses.preference import sides
from llmkit.losses.preference_node import Judged, PreferenceLoss
from llmkit.losses.sides import Sides


@dataclass(frozen=True)
class Pairwise:
    """What is made small: the sum over pairs, whose count is their number."""

    loss: PreferenceLoss
    needs: ClassVar[Needs] = Needs(by_weight=False)

    def judge(self, scores: Tensor | Scores | Referenced, batch: Batch) -> Judged:
        """The losses and figures of the batch's pairs."""
        return self.loss(*self.compared(scores, batch))

    def compared(self, scores: Tensor | Scores | Referenced, batch: Batch) -> tuple[Sides, Sides | None]:
        """What the policy and the reference say of the batch's pairs; a reference that was asked before lies in it."""
        policy = scores.policy if isinstance(scores, Referenced) else scores
        reference = scores.reference if isinstance(scores, Referenced) else self._kept(batch)
        policy = policy.logps if isinstance(policy, Entropic) else policy
        both = [sides(said, batch, self.loss.tail) for said in (policy, reference) if said is not None]
        return both[0], both[1] if len(both) > 1 else None

    def _kept(self, batch: Batch) -> Tensor | None:
        if not self.loss.needs_reference or batch.branches is None:
            return None
        return batch.branches.each.get("reference")

    def __call__(self, scores: Tensor | Scores | Referenced, batch: Batch) -> LossSum:
        """The sum of the losses, and the number of pairs; of each figure the same."""
        made = self.judge(scores, batch)
        count = torch.tensor(float(len(made.losses)), device=made.losses.device)
        return LossSum(made.losses.sum(), count, {name: (one.sum(), count) for name, one in made.figures.items()})
