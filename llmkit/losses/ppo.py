"""The losses of PPO (arXiv:1707.06347) with a critic: N tokens, each with an advantage and the return that its value is
to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.core.types import Batch, Entropic, LossSum
from llmkit.losses.policy import clipped, drawn, logged


def clipped_values(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2) / 2, and where the clip holds the gradient, (N,) each;
    a clip of 0 is none."""
    plain = (values - returns).square()
    if not clip:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    held = (torch.maximum(torch.minimum(values, old + clip), old - clip) - returns).square()
    return torch.maximum(plain, held) / 2, held > plain


@dataclass(frozen=True)
class PpoLoss:
    """Clipped policy loss, clipped value loss and a bonus on the entropy, each the mean over all tokens."""

    clip: float = 0.2
    clip_values: float = 0.2
    value: float = 0.1
    """What the value loss counts."""
    entropy: float = 0.0

    def __call__(self, scores: Tensor | Entropic, values: Tensor, batch: Batch) -> LossSum:
        """The sum over tokens, and how many there are; `batch.branches.each` has "advantage", "old", "value" (the
        critic's before the update) and "return"."""
        seen = drawn(scores, batch)
        each, ratio = seen.branches.each, torch.exp(seen.logps - seen.old)
        losses, hit = clipped(ratio, seen.advantages, self.clip, self.clip)
        valued, bounded = clipped_values(values, each["value"], each["return"], self.clip_values)
        losses = losses + self.value * valued
        if self.entropy:
            if seen.entropy is None:
                raise ValueError("a bonus on the entropy without entropies")
            losses = losses - self.entropy * seen.entropy
        extras = logged(seen, ratio, hit, each.get("reference"), None)
        n = extras["ratio"][1]
        extras["value_loss"] = valued.detach().double().sum(), n
        extras["value_clipped"] = bounded.double().sum(), n
        return LossSum((losses * seen.weights).sum(), seen.weights.sum(), extras)
