"""The recipe's `kl` of `kind: ppo`: what a divergence from the reference costs, fixed or steered to a target."""

from __future__ import annotations

from typing import Literal

from llmkit.core.config import config, setting


@config
class FixedKl:
    """One price."""

    kind: Literal["fixed"] = "fixed"
    beta: float = setting(default=0.05, least=0.0)
    """The price."""

    def after(self, beta: float, divergence: float, completions: int) -> float:
        """The price after a step: the same."""
        return beta


@config
class AdaptiveKl:
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
        """The price after a step of so many completions with this mean divergence."""
        error = min(0.2, max(-0.2, divergence / self.target - 1))
        return beta * (1 + error * completions / self.horizon)


KlControl = FixedKl | AdaptiveKl
