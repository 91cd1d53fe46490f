"""The arithmetic of losses over policies: N tokens of K completions, each with an advantage.

Every loss is a ratio of the policy to the one before its update, a surrogate of it with the advantage, and a share of
each token in the whole; the parts are here, and the members of the union (`policy_node.py`) put them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmkit.core.types import Batch, Branches, Entropic, LossSum
from llmkit.losses.kl import ESTIMATES, corrected, k3

if TYPE_CHECKING:
    from llmkit.losses.over_policy_node import OverPolicy


@dataclass(frozen=True)
class Drawn:
    """A batch's tokens that have a weight, (N,) each."""

    logps: Tensor
    old: Tensor
    """Of the policy before the update; without one its own, so that the ratio is 1."""
    weights: Tensor
    advantages: Tensor
    branches: Branches
    entropy: Tensor | None

    @property
    def reference(self) -> Tensor | None:
        """Log-probabilities by the reference, (N,), where the loss asks for them."""
        return self.branches.each.get("reference")

    @property
    def completions(self) -> int:
        """K."""
        return len(self.branches.group)

    def summed(self, each_N: Tensor) -> Tensor:
        """The sum over the tokens of each completion, (K,)."""
        return each_N.new_zeros(self.completions).index_add(0, self.branches.of, each_N)

    def mean(self, each_N: Tensor) -> Tensor:
        """The weighted mean over the tokens of each completion, (K,); 0 of none."""
        return self.summed(each_N * self.weights) / self.summed(self.weights).clamp_min(1e-9)

    def spread(self, per_K: Tensor) -> Tensor:
        """Of each token what its completion has, (N,)."""
        return per_K[self.branches.of]

    def even(self) -> Tensor:
        """Shares that make a sum over tokens a sum of completions' means, (N,)."""
        return self.weights / self.spread(self.summed(self.weights))


def drawn(scores: Tensor | Entropic, batch: Batch) -> Drawn:
    """What the scored model says of a batch, beside what is known of its completions.

    Raises:
        ValueError: the batch has no completions, or they have no advantages.
    """
    branches = batch.branches
    if branches is None:
        raise ValueError("a loss over policies takes batches of completions")
    logps, entropy = (scores.logps, scores.entropy) if isinstance(scores, Entropic) else (scores, None)
    advantages = branches.each.get("advantage")
    if advantages is None:
        if "advantage" not in branches.per:
            raise ValueError("completions without advantages")
        advantages = branches.per["advantage"][branches.of]
    old = branches.each.get("old", logps.detach())
    return Drawn(logps, old, batch.weights[batch.weights != 0], advantages.to(logps), branches, entropy)


def by_token(seen: Drawn) -> Tensor:
    """The ratio of each token, (N,)."""
    return torch.exp(seen.logps - seen.old)


def by_mean(seen: Drawn) -> Tensor:
    """Of each token its completion's ratio to the power of 1 / its length, (N,)."""
    return torch.exp(seen.spread(seen.mean(seen.logps - seen.old)))


def by_sum(seen: Drawn) -> Tensor:
    """Of each token its completion's ratio, (N,)."""
    return torch.exp(seen.spread(seen.summed(seen.logps - seen.old)))


NONE = 1e-9
"""Stands for a count of 0 where a mean is made: of a step of which nothing counts."""
RATIOS = {"token": by_token, "mean": by_mean, "sum": by_sum}
LOGGED = ("ratio", "kl", "entropy", "importance")
"""Figures that each loss over policies has."""


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A), and where the clip holds the gradient back, (N,) each
    (arXiv:1707.06347)."""
    held = ratio.clamp(1 - low, 1 + high)
    hit = torch.where(advantages > 0, ratio > 1 + high, (ratio < 1 - low) & (advantages < 0))
    return -torch.minimum(ratio * advantages, held * advantages), hit


def weighed(seen: Drawn, ratio: Tensor, high: float) -> tuple[Tensor, Tensor]:
    """-min(r, high) A log p with r held fixed, and where the bound holds it, (N,) each: every token keeps its gradient
    (arXiv:2506.13585)."""
    return -(ratio.detach().clamp_max(high) * seen.advantages * seen.logps), ratio > high


def importance(seen: Drawn, whole: bool, most: float) -> Tensor | None:
    """min(old / behaviour, most), (N,): of tokens that another law drew; of `whole` completions, by token else. Where
    nobody told the law (NaN), it is taken for the old one."""
    behaviour = seen.branches.each.get("behaviour")
    if behaviour is None:
        return None
    gap = torch.where(behaviour.isnan(), 0.0, seen.old.detach() - behaviour)
    return torch.exp(seen.spread(seen.summed(gap)) if whole else gap).clamp_max(most)


def loss(node: OverPolicy, scores: Tensor | Entropic, batch: Batch) -> LossSum:
    """The sum over tokens of their shares x (importance x (surrogate + beta KL) - bonus x entropy), and its count.

    Raises:
        ValueError: the batch has no advantages; or there is a price on the divergence from a reference, and none.
    """
    seen = drawn(scores, batch)
    ratio = RATIOS[node.ratio](seen)
    each, own = node.surrogate(seen, ratio)
    behaved = importance(seen, node.ratio != "token", node.truncate)
    reference = seen.reference
    if node.beta and node.penalty == "loss":
        if reference is None:
            raise ValueError("beta without log-probabilities of a reference")
        each = each + node.beta * divergence(node, seen, reference)
    each = each if behaved is None else each * behaved
    if node.entropy:
        if seen.entropy is None:
            raise ValueError("a bonus on the entropy without entropies")
        each = each - node.entropy * seen.entropy
    shares = seen.even() if node.even else seen.weights / node.divisor
    count = seen.weights.sum() if node.per_token else seen.weights.new_tensor(seen.completions)
    return LossSum((each * shares).sum(), count, logged(seen, ratio, own, reference, behaved))


def divergence(node: OverPolicy, seen: Drawn, reference: Tensor) -> Tensor:
    """The node's estimate of the divergence at each token, (N,): corrected by the token's own ratio, of whatever the
    surrogate's is. By a completion's mean (GSPO) or product the gradient would be that of no divergence."""
    if node.kl_corrected:
        return corrected(node.kl, seen.logps, reference, by_token(seen))
    return ESTIMATES[node.kl](seen.logps, reference)


def logged(
    seen: Drawn, ratio: Tensor, own: Mapping[str, Tensor], reference: Tensor | None, behaved: Tensor | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over tokens: of the ratio, of a loss's own figures (how many a bound holds back), of the divergence (k3)
    and the entropy."""
    logps, n = seen.logps.detach(), torch.tensor(len(seen.logps) or NONE)
    made = {"ratio": ratio.detach(), **own}
    if reference is not None:
        made["kl"] = k3(logps, reference)
    if seen.entropy is not None:
        made["entropy"] = seen.entropy.detach()
    if behaved is not None:
        made["importance"] = behaved
    return {name: (each.double().sum(), n) for name, each in made.items()}
