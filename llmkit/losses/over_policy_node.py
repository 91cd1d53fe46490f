"""What the losses of `kind: policy` share: a recipe's `loss` over completions that the policy drew, each with an
advantage.

`(scores, batch)` -> a sum with its count: `scores` are log-probabilities (or `Entropic`) of the tokens that have a
weight. Of `batch.branches` it reads `per["advantage"]` (or `each["advantage"]`, by token); `each["old"]`, the policy's
own before the update (without it the ratio is 1); `each["reference"]`, for the divergence; `each["behaviour"]`, of the
law that drew the tokens where that is another than the policy's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from llmkit.core.config import Conflict, config, setting
from llmkit.core.types import Entropic, LossSum, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from llmkit.core.types import Batch
    from llmkit.losses.policy import Drawn

Ratio = Literal["token", "mean", "sum"]
Share = Literal["token", "even", "length"]
Advantage = Literal["group", "centred", "batch", "leave_one_out", "group_batch"]
"""What is made of rewards: less their group's mean, over its deviation (`group`) or not (`centred`) or over that of the
batch (`group_batch`); less the batch's mean, over its deviation (`batch`); less the mean of the others of the group."""


@config
class OverPolicy:
    """What all members share."""

    ratio: ClassVar[Ratio] = "token"
    """Of what a ratio is: a token; or a completion, to the power of 1 / its length (`mean`) or as it is (`sum`)."""
    share: ClassVar[Share] = "even"
    """What a token counts: as any other; 1 / how many its completion has; or 1 / one length for all."""
    beta: float = setting(default=0.0, least=0.0)
    """What the divergence from the reference costs; 0 asks for no reference."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """The estimate of it, token by token."""
    kl_corrected: bool = True
    """The estimate is multiplied by the ratio, so that its gradient is that of KL(policy, reference); without it k1's
    is 0 in the mean, and k3's that of KL(reference, policy)."""
    penalty: Literal["loss", "reward"] = "loss"
    """Where the divergence is counted: token by token in the loss, where what a token does to later ones is left out;
    or in the reward of a completion, where the optimum is reference x exp(reward / beta)."""
    entropy: float = setting(default=0.0, least=0.0)
    """A bonus on the entropy of each token, with the share that the token has in the loss."""
    truncate: float = setting(default=2.0, least=1.0)
    """The largest importance weight of tokens that another law drew than the policy before the update."""

    @property
    def needs(self) -> Needs:
        """What it reads of the head."""
        return Needs(by_weight=False, entropy="trained" if self.entropy else "figure")

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if self.beta and self.penalty == "loss" and self.kl == "k1" and not self.kl_corrected:
            what = "the gradient of k1 is 0 in the mean: it holds nothing back"
            yield Conflict("kl", what, "set kl_corrected, or kl: k2", "kl_corrected")

    def within(self, length: int) -> Self:
        """The same for completions of at most so many tokens."""
        return self

    @property
    def divisor(self) -> float:
        """What sums over tokens are divided by, beside the count."""
        return 1.0

    @property
    def per_token(self) -> bool:
        """Whether the count is of tokens; else of completions."""
        return self.share == "token"

    def count(self, completions: int, tokens: float) -> float:
        """What the whole of a step with so many completions and tokens is divided by."""
        return tokens if self.per_token else float(completions)

    @property
    def compares(self) -> bool:
        """Whether it reads what the reference says."""
        return self.beta > 0

    @property
    def even(self) -> bool:
        """Whether each completion counts alike, whatever its length."""
        return self.share == "even"

    def surrogate(self, seen: Drawn, ratio: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Of each token what is made small, (N,), and figures of it, (N,) each: `clipped`, whether a bound on the ratio
        holds it back."""
        raise NotImplementedError

    def __call__(self, scores: Tensor | Entropic, batch: Batch) -> LossSum:
        """The sum over the tokens of the batch by their shares, and its count."""
        from llmkit.losses.policy import loss

        return loss(self, scores, batch)


@config
class Clipping(OverPolicy):
    """A ratio that is clipped on both sides."""

    clip: float = setting(default=0.2, above=0.0, most=1.0)
    """How far below 1 the ratio may fall."""
    clip_high: float | None = setting(default=None, above=0.0)
    """How far above 1 it may rise; as far as below, where nothing is said."""

    @property
    def bounds(self) -> tuple[float, float]:
        """Both."""
        return self.clip, self.clip if self.clip_high is None else self.clip_high

    def surrogate(self, seen: Drawn, ratio: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-min(r A, clip(r) A), and where it is flat."""
        from llmkit.losses.policy import clipped

        each, hit = clipped(ratio, seen.advantages, *self.bounds)
        return each, {"clipped": hit}
