"""The recipe's `gae` node: how rewards of tokens and values become advantages."""

from __future__ import annotations

from llmkit.core.config import config, setting


@config
class Gae:
    """Generalised advantage estimation (arXiv:1506.02438)."""

    discount: float = setting(default=1.0, above=0.0, most=1.0)
    """What a reward is worth one token earlier."""
    decay: float = setting(default=0.95, least=0.0, most=1.0)
    """What later errors of the values count for a token (lambda): at 0 the next value says all, at 1 what came does."""
    whiten: bool = True
    """Advantages less their mean, over their deviation, of all tokens of a rollout."""
    whiten_rewards: bool = False
    """Rewards of tokens over their deviation, of all tokens of a rollout."""
