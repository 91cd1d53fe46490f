"""KTO over batches: the completions of a batch, the sum of their losses, and what the step's baseline is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from llmkit.core.types import Batch, Branches, Entropic, LossSum, Needs, Referenced, Scores
from llmkit.losses.kto_node import Kto, Singles
from llmkit.losses.preference import summed
from llmkit.losses.sides import Judged


def with_baseline(batch: Batch, baseline: float) -> Batch:
    """The batch of which `singles` knows the step's baseline."""
    branches = _branches(batch)
    baseline_K = torch.full((len(branches.group),), baseline, dtype=torch.float64, device=branches.of.device)
    return replace(batch, branches=replace(branches, per={**branches.per, "baseline": baseline_K}))


def distance(policy: Tensor, reference: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of log-probabilities (N,) of mismatched completions: the sum of log pi - log pi_ref, and how many they are."""
    ratios_K = summed(policy.double() - reference.double(), _branches(batch)).detach()
    return ratios_K.sum(), torch.tensor(float(len(ratios_K)), dtype=torch.float64, device=ratios_K.device)


def baseline(total: float, count: float) -> float:
    """z from the sums of all micro-batches and ranks."""
    return max(0.0, total / count)


def singles(policy: Tensor, reference: Tensor, batch: Batch) -> Singles:
    """What is said of the completions of a batch, whose branches have `label` and, where there is one, `baseline`.

    Raises:
        ValueError: they have no labels.
    """
    branches = _branches(batch)
    if "label" not in branches.per:
        raise ValueError("completions without a label are neither good nor bad")
    logps_K, other_K = summed(policy.double(), branches), summed(reference.double(), branches)
    tokens_K, nothing_K = summed(torch.ones_like(policy).double(), branches), torch.zeros_like(other_K)
    per = branches.per
    return Singles(logps_K - other_K, logps_K, tokens_K, per["label"], per.get("baseline", nothing_K))


def _branches(batch: Batch) -> Branches:
    if batch.branches is None:
        raise ValueError("kto takes batches of completions")
    return batch.branches


@dataclass(frozen=True)
class Unpaired:
    """What is made small: the sum over completions, whose count is their number."""

    loss: Kto
    baseline: float = 0.0
    """z, where the batch does not say it."""
    needs: ClassVar[Needs] = Needs(by_weight=False)

    def said(self, scores: Tensor | Scores | Referenced, batch: Batch) -> Singles:
        """What policy and reference say of the batch's completions; a reference that was asked before lies in it."""
        policy = scores.policy if isinstance(scores, Referenced) else scores
        policy = policy.logps if isinstance(policy, Scores | Entropic) else policy
        reference = scores.reference if isinstance(scores, Referenced) else _branches(batch).each["reference"]
        made = singles(policy, reference, batch)
        return made if "baseline" in _branches(batch).per else made._replace(baseline=made.baseline + self.baseline)

    def judge(self, scores: Tensor | Scores | Referenced, batch: Batch) -> Judged:
        """The losses and figures of the batch's completions, with what a mean of them needs."""
        said = self.said(scores, batch)
        made = self.loss(said)
        more = {"reward": self.loss.beta * said.ratios, "logps": said.logps, "label": said.labels.to(said.logps)}
        return Judged(made.losses, {**made.figures, **{name: one.detach() for name, one in more.items()}})

    def __call__(self, scores: Tensor | Scores | Referenced, batch: Batch) -> LossSum:
        """The sum of the losses, and the number of completions; figures beside them."""
        return self.summed(self.said(scores, batch))

    def summed(self, said: Singles) -> LossSum:
        """The sum of the losses; rewards and log-probabilities beside them, of good and of bad completions each."""
        made, good_K = self.loss(said), (said.labels > 0.5).double()
        count = torch.tensor(float(len(made.losses)), dtype=torch.float64, device=made.losses.device)
        extras = {name: (one.sum(), count) for name, one in made.figures.items()}
        sides = {"chosen": good_K, "rejected": 1 - good_K}
        figures = {"reward": self.loss.beta * said.ratios.detach(), "logps": said.logps.detach()}
        for side, share_K in sides.items():
            of = share_K.sum().clamp_min(1e-9)  # a step may have none
            extras |= {f"{name}_{side}": ((one * share_K).sum(), of) for name, one in figures.items()}
        return LossSum(made.losses.sum(), count, extras | {"baseline": (said.baseline.sum(), count)})
