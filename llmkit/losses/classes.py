"""Losses over classes: logits (N, C) of the targets that have a weight -> a sum with its count, in fp32 at least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.core.types import Batch, LossSum

TINY = 1e-12
"""Keeps the slope of (1 - p)^gamma finite at p = 1."""


def entropies(logits_NC: Tensor, targets_N: Tensor, smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of each target, (N,), with a share of it spread over all classes."""
    logps_NC = logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32)).log_softmax(1)
    picked_N = logps_NC.gather(1, targets_N[:, None])[:, 0]
    return -((1 - smoothing) * picked_N + smoothing * logps_NC.mean(1)) if smoothing else -picked_N


def summed(each_N: Tensor, logits_NC: Tensor, targets_N: Tensor, weights_N: Tensor) -> LossSum:
    """The weighted sum of losses, with how many were right."""
    right = (logits_NC.detach().argmax(1) == targets_N).sum()
    return LossSum((each_N * weights_N).sum(), weights_N.sum(), {"accuracy": (right, torch.tensor(len(targets_N)))})


@dataclass(frozen=True)
class Entropy:
    """Cross-entropy."""

    smoothing: float = 0.0

    def __call__(self, scores: Tensor, batch: Batch) -> LossSum:
        """The sum of -w log p of the class."""
        chosen = batch.weights != 0
        targets, weights = batch.labels[chosen], batch.weights[chosen]
        return summed(entropies(scores, targets, self.smoothing), scores, targets, weights)


@dataclass(frozen=True)
class FocalLoss:
    """Focal loss; its count is that of the targets, so that accumulation cannot change it."""

    gamma: float = 2.0
    alpha: tuple[float, ...] | None = None

    def __call__(self, scores: Tensor, batch: Batch) -> LossSum:
        """The sum of -w alpha (1 - p)^gamma log p of the class."""
        chosen = batch.weights != 0
        targets, weights = batch.labels[chosen], batch.weights[chosen]
        each = entropies(scores, targets)
        if self.gamma:
            each = each * (-torch.expm1(-each)).clamp_min(TINY) ** self.gamma
        if self.alpha is not None:
            each = each * each.new_tensor(self.alpha)[targets]
        return summed(each, scores, targets, weights)


class GroupDroLoss:
    """Group-DRO: sum over groups of q_g times the group's mean loss in the step; q is kept from step to step."""

    def __init__(self, rate: float, smoothing: float, groups: tuple[int, ...], names: tuple[str, ...]) -> None:
        self.rate, self.smoothing, self.names = rate, smoothing, names
        self.groups = torch.tensor(groups)
        self.logs = torch.full((len(names),), -math.log(len(names)), dtype=torch.float64)
        """The log of each group's weight."""
        self.sizes = torch.zeros(len(names), dtype=torch.int64)

    def begin(self, ids: Iterable[int]) -> None:
        """A step begins, over these examples."""
        self.sizes = torch.bincount(self.groups[list(ids)], minlength=len(self.names))

    def __call__(self, scores: Tensor, batch: Batch) -> LossSum:
        """The sum over examples of n q_g / n_g times -w log p, where n_g of the step's n examples are of group g."""
        chosen = batch.weights != 0
        targets, weights = batch.labels[chosen], batch.weights[chosen]
        mine = self.groups[list(batch.ids)][: len(targets)]
        each = entropies(scores, targets, self.smoothing)
        factors = self.logs.exp() * self.sizes.sum() / self.sizes.clamp_min(1)
        made = summed(each * factors[mine].to(each), scores, targets, weights)
        extras = dict(made.extras)
        for group in mine.unique().tolist():
            here = (mine == group).to(each.device)
            extras[f"group.{self.names[group]}"] = (each.detach()[here].double().sum(), here.sum())
        return LossSum(made.total, made.count, extras)

    def update(self, sums: LossSum) -> None:
        """A step was applied: the weights move by the mean losses that it saw, group by group."""
        grown = []
        for name, log in zip(self.names, self.logs.tolist(), strict=True):
            top, bottom = sums.extras.get(f"group.{name}", (torch.zeros(()), torch.ones(())))
            grown.append(log + self.rate * float(top) / float(bottom))
        self.logs = torch.tensor(grown, dtype=torch.float64).log_softmax(0)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"loss/group_logs": self.logs}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        self.logs = tensors["loss/group_logs"].clone()
