"""The recipe's `loss` of `kind: policy`: over completions that the policy drew, each with an advantage. What they
share, and what a batch has to hold, is in `over_policy_node.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from llmkit.core.config import config, setting
from llmkit.losses.over_policy_node import Advantage, Clipping, OverPolicy, Ratio, Share
from llmkit.losses.own_policy_node import OwnPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from llmkit.losses.policy import Drawn


@config
class Grpo(Clipping):
    """GRPO (arXiv:2402.03300): clipped by token; the mean of completions' means over their tokens."""

    kind: Literal["grpo"] = "grpo"
    advantage: Advantage = "group"


@config
class DrGrpo(Clipping):
    """Dr. GRPO (arXiv:2503.20783): sums over tokens divided by one constant, and advantages that are no further than
    centred, so that neither long answers nor hard prompts count less."""

    share: ClassVar[Share] = "length"
    kind: Literal["dr_grpo"] = "dr_grpo"
    advantage: Advantage = "centred"
    length: int | None = setting(default=None, least=1)
    """The constant; `rollout.max_tokens` where nothing is said."""

    @property
    def divisor(self) -> float:
        """The constant."""
        if self.length is None:
            raise ValueError("dr_grpo without its length: ask `within` first")
        return float(self.length)

    def within(self, length: int) -> Self:
        """The same for completions of at most so many tokens."""
        return self if self.length is not None else replace(self, length=length)


@config
class Dapo(Clipping):
    """DAPO (arXiv:2503.14476): clipped by token with more room above than below; the mean over all tokens."""

    share: ClassVar[Share] = "token"
    kind: Literal["dapo"] = "dapo"
    clip_high: float | None = setting(default=0.28, above=0.0)
    """How far above 1 the ratio may rise."""
    advantage: Advantage = "group"


@config
class Gspo(Clipping):
    """GSPO (arXiv:2507.18071): one ratio a completion, to the power of 1 / its length, clipped closely."""

    ratio: ClassVar[Ratio] = "mean"
    kind: Literal["gspo"] = "gspo"
    clip: float = setting(default=3e-4, above=0.0, most=1.0)
    """How far below 1 the ratio may fall."""
    clip_high: float | None = setting(default=4e-4, above=0.0)
    """How far above 1 it may rise."""
    advantage: Advantage = "group"


@config
class Cispo(OverPolicy):
    """CISPO (arXiv:2506.13585): the ratio is a bounded weight and no way for the gradient, which every token keeps; the
    mean over all tokens."""

    share: ClassVar[Share] = "token"
    kind: Literal["cispo"] = "cispo"
    most: float = setting(default=5.0, above=0.0)
    """The largest ratio."""
    advantage: Advantage = "group"

    def surrogate(self, seen: Drawn, ratio: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-min(r, most) A log p, and where it is bounded."""
        from llmkit.losses.policy import weighed

        each, hit = weighed(seen, ratio, self.most)
        return each, {"clipped": hit}


@config
class Rloo(Clipping):
    """RLOO (arXiv:2402.14740): a completion is one action, its baseline the mean reward of the others of its group, and
    the divergence is part of its reward."""

    ratio: ClassVar[Ratio] = "sum"
    kind: Literal["rloo"] = "rloo"
    beta: float = setting(default=0.05, least=0.0)
    """What the divergence from the reference costs; 0 asks for no reference."""
    penalty: Literal["loss", "reward"] = "reward"
    """Where the divergence is counted: in the reward of a completion, or token by token in the loss."""
    advantage: Advantage = "leave_one_out"


@config
class Reinforce(Clipping):
    """REINFORCE++ (arXiv:2501.03262): clipped by token, without groups: what is left of the reward after the price of
    the divergence from a token on, less its mean over the batch and over its deviation; the mean over all tokens."""

    share: ClassVar[Share] = "token"
    kind: Literal["reinforce"] = "reinforce"
    beta: float = setting(default=0.01, least=0.0)
    """What the divergence from the reference costs; 0 asks for no reference."""
    kl: Literal["k1", "k2", "k3"] = "k1"
    """The estimate of it, token by token."""
    penalty: Literal["loss", "reward"] = "reward"
    """Where the divergence is counted: in the rewards of tokens, or in the loss."""
    advantage: Advantage = "batch"


PolicyLoss = Grpo | DrGrpo | Dapo | Gspo | Cispo | Rloo | Reinforce | OwnPolicy
