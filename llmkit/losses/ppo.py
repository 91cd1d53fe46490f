"""The arithmetic of PPO (arXiv:1707.06347) with a critic: N tokens, each with an advantage and the return that its
value is to be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmkit.core.types import Batch, LossSum, Valued
from llmkit.losses.policy import clipped, drawn, logged

if TYPE_CHECKING:
    from llmkit.losses.ppo_node import PpoLoss


def clipped_values(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2) / 2, and where the clip holds the gradient, (N,) each;
    a clip of 0 is none."""
    plain = (values - returns).square()
    if not clip:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    held = (torch.maximum(torch.minimum(values, old + clip), old - clip) - returns).square()
    return torch.maximum(plain, held) / 2, held > plain


def loss(node: PpoLoss, said: Valued, batch: Batch) -> LossSum:
    """The sum over tokens, and how many there are.

    Raises:
        ValueError: there is a bonus on the entropy, and none was asked for.
    """
    seen = drawn(said.policy, batch)
    each, ratio = seen.branches.each, torch.exp(seen.logps - seen.old)
    losses, hit = clipped(ratio, seen.advantages, node.clip, node.clip)
    valued, bounded = clipped_values(said.values, each["value"], each["return"], node.clip_values)
    losses = losses + node.value * valued
    if node.entropy:
        if seen.entropy is None:
            raise ValueError("a bonus on the entropy without entropies")
        losses = losses - node.entropy * seen.entropy
    extras = logged(seen, ratio, {"clipped": hit}, seen.reference, None)
    n = extras["ratio"][1]
    extras["value_loss"] = valued.detach().double().sum(), n
    extras["value_clipped"] = bounded.double().sum(), n
    return LossSum((losses * seen.weights).sum(), seen.weights.sum(), extras)
