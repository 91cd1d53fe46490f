"""The recipe's `loss` and `kl` of `kind: ppo`: what is made small, and what a divergence from the reference costs,
fixed or steered to a target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmkit.core.config import config, setting
from llmkit.core.types import LossSum, Needs, Valued

if TYPE_CHECKING:
    from llmkit.core.types import Batch


@config
class PpoLoss:
    """PPO's loss (arXiv:1707.06347): of the policy and of the values clipped, with a bonus on the entropy, each the
    mean over all tokens."""

    clip: float = setting(default=0.2, above=0.0, most=1.0)
    """How far from 1 a token's ratio may go."""
    clip_values: float = setting(default=0.2, least=0.0)
    """How far a value may go from what it was when the answer was drawn; 0 lets it go anywhere."""
    value: float = setting(default=0.1, above=0.0)
    """What the loss of the values counts."""
    entropy: float = setting(default=0.0, least=0.0)
    """A bonus on the entropy of each token."""

    @property
    def needs(self) -> Needs:
        """What it reads of the head."""
        return Needs(by_weight=False, entropy="trained" if self.entropy else "figure", values=True)

    def __call__(self, said: Valued, batch: Batch) -> LossSum:
        """The sum over tokens, and how many there are; `batch.branches.each` has "advantage", "old", "value" (the
        critic's before the update) and "return"."""
        from llmkit.losses.ppo import loss

        return loss(self, said, batch)


@config
class OverKl:
    """What all prices share."""

    estimate: Literal["k1", "k2", "k3"] = "k1"
    """Of the divergence, token by token: part of each token's reward."""


@config
class FixedKl(OverKl):
    """One price."""

    kind: Literal["fixed"] = "fixed"
    beta: float = setting(default=0.05, least=0.0)
    """The price; 0 asks for no reference."""

    def after(self, beta: float, divergence: float, completions: int) -> float:
        """The price after a rollout: the same."""
        return beta


@config
class AdaptiveKl(OverKl):
    """A price that grows while completions are further from the reference than the target, and falls while they are
    nearer (arXiv:1909.08593)."""

    kind: Literal["adaptive"] = "adaptive"
    beta: float = setting(default=0.2, above=0.0)
    """The price at first."""
    target: float = setting(default=6.0, above=0.0)
    """The divergence of a completion that is wanted, summed over its tokens, in nats."""
    horizon: int = setting(default=10_000, least=1)
    """Completions in which a divergence of a fifth too much makes the price a fifth more, about."""

    def after(self, beta: float, divergence: float, completions: int) -> float:
        """The price after a rollout of so many completions with this mean divergence."""
        error = min(0.2, max(-0.2, divergence / self.target - 1))
        return beta * (1 + error * completions / self.horizon)


KlControl = FixedKl | AdaptiveKl
