"""Losses of preference without a reference. p is log pi(y|x) of a completion, w the chosen one, l the rejected one,
s(x) the sigmoid, |y| a completion's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from llmkit.core.config import Conflict, config, setting

if TYPE_CHECKING:
    from llmkit.losses.sides import Judged, Sides


@config
class SimPo:
    """Simple preference optimisation (arXiv:2405.14734): -log s(beta (p_w / |w| - p_l / |l|) - gamma)."""

    kind: Literal["simpo"] = "simpo"
    beta: float = setting(default=2.0, above=0.0)
    """The scale of rewards."""
    gamma: float = setting(default=1.0, least=0.0)
    """The margin that is asked for."""
    label_smoothing: float = setting(default=0.0, least=0.0, below=0.5)
    """Share of the labels that may be wrong."""
    alpha: float = 0.0
    """Shape of the reward (1 - exp(-alpha p / |y|)) / alpha (AlphaPO, arXiv:2501.03884); at 0 it is p / |y|."""
    needs_reference: ClassVar[bool] = False
    whole_step: ClassVar[bool] = False
    tail: ClassVar[float] = 1.0

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs."""
        from llmkit.losses.margins import sigmoid
        from llmkit.losses.preference import judged, means

        chosen, rejected = means(policy)
        if self.alpha:
            chosen, rejected = (-(-self.alpha * mean).expm1() / self.alpha for mean in (chosen, rejected))
        chosen, rejected = self.beta * chosen, self.beta * rejected
        return judged(sigmoid(chosen - rejected - self.gamma, self.label_smoothing), chosen, rejected, policy)


@config
class Orpo:
    """Odds ratio preference optimisation (arXiv:2403.07691): -p_w / |w| - beta log s(log odds_w - log odds_l), where
    odds are P / (1 - P) and log P is p / |y|."""

    kind: Literal["orpo"] = "orpo"
    beta: float = setting(default=0.1, above=0.0)
    """What the odds count beside the likelihood of what was chosen."""
    needs_reference: ClassVar[bool] = False
    whole_step: ClassVar[bool] = False
    tail: ClassVar[float] = 1.0

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs; `nll` and `log_odds` beside them."""
        from llmkit.losses.margins import log_odds, sigmoid
        from llmkit.losses.preference import judged, means

        chosen, rejected = means(policy)
        odds = log_odds(chosen) - log_odds(rejected)
        more = {"nll": -chosen, "log_odds": odds}
        return judged(self.beta * sigmoid(odds) - chosen, self.beta * chosen, self.beta * rejected, policy, more)


@config
class Cpo:
    """Contrastive preference optimisation (arXiv:2401.08417): -log s(beta (p_w - p_l)) - alpha p_w / |w|."""

    kind: Literal["cpo"] = "cpo"
    beta: float = setting(default=0.1, above=0.0)
    """The scale of rewards."""
    alpha: float = setting(default=1.0, least=0.0)
    """What the likelihood of the chosen completion counts, per token."""
    variant: Literal["sigmoid", "hinge"] = "sigmoid"
    """The loss of the margin: -log s(m) or max(0, 1 - m)."""
    label_smoothing: float = setting(default=0.0, least=0.0, below=0.5)
    """Share of the labels that may be wrong, with `sigmoid`."""
    needs_reference: ClassVar[bool] = False
    whole_step: ClassVar[bool] = False
    tail: ClassVar[float] = 1.0

    def problems(self) -> Iterator[Conflict]:
        """A share of wrong labels where none is taken."""
        if self.label_smoothing and self.variant == "hinge":
            yield Conflict("label_smoothing", "variant hinge has no wrong labels", "remove it", "variant")

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs; `nll` beside them."""
        from llmkit.losses.margins import MARGINS
        from llmkit.losses.preference import judged, means

        chosen, rejected, nll = self.beta * policy.chosen, self.beta * policy.rejected, -means(policy)[0]
        losses = MARGINS[self.variant](chosen - rejected, self.label_smoothing) + self.alpha * nll
        return judged(losses, chosen, rejected, policy, {"nll": nll})


@config
class Nll:
    """Negative log-likelihood of the chosen completion: the supervised part of a mixture (RPO, arXiv:2404.19733; MPO,
    arXiv:2411.10442)."""

    kind: Literal["nll"] = "nll"
    per: Literal["completion", "token"] = "completion"
    """What counts alike: each completion by its mean, or each token of the step."""
    needs_reference: ClassVar[bool] = False
    tail: ClassVar[float] = 1.0

    @property
    def whole_step(self) -> bool:
        """A token's share follows from how many the step has."""
        return self.per == "token"

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs."""
        from llmkit.losses.preference import judged, means

        chosen, rejected = means(policy)
        tokens = policy.chosen_tokens
        losses = policy.nll / (tokens.mean() if self.per == "token" else tokens).clamp_min(1)
        return judged(losses, chosen, rejected, policy, {"nll": losses})
