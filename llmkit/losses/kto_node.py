"""The loss of completions that are good or bad each by itself. Light."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from llmkit.core.config import config, setting
from llmkit.losses.sides import Judged

if TYPE_CHECKING:
    from torch import Tensor


class Singles(NamedTuple):
    """What a policy and its reference say of K completions, (K,) each, in fp64."""

    ratios: Tensor
    """log pi - log pi_ref."""
    logps: Tensor
    """The policy's log-probability."""
    tokens: Tensor
    """How many tokens it is of."""
    labels: Tensor
    """1 for good ones, 0 for bad ones."""
    baseline: Tensor
    """How far the policy is from the reference in this step, at least 0: the same for all, without gradient."""


@config
class Kto:
    """Kahneman-Tversky optimisation (arXiv:2402.01306): 1 - s(beta (r - z)) of a good completion, 1 - s(beta (z - r))
    of a bad one, where r is log pi - log pi_ref, s the sigmoid, and z the mean of r over the step's prompts with
    completions of other prompts, at least 0. z is of the whole step and known before it: no micro-batch changes it."""

    kind: Literal["kto"] = "kto"
    beta: float = setting(default=0.1, above=0.0)
    """How strongly the policy is held to the reference."""
    desirable: float = setting(default=1.0, least=0.0)
    """What a good completion counts."""
    undesirable: float = setting(default=1.0, least=0.0)
    """What a bad completion counts. The paper wants the sums of both to be alike, up to 4/3."""
    variant: Literal["kto", "apo_zero"] = "kto"
    """`apo_zero` has z = 0 (APO-zero of single completions, arXiv:2408.06266)."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = False
    tail: ClassVar[float] = 1.0

    @property
    def needs_baseline(self) -> bool:
        """Whether z is asked for before each step."""
        return self.variant == "kto"

    def __call__(self, said: Singles) -> Judged:
        """The losses of the completions, (K,)."""
        import torch

        good, gains = said.labels > 0.5, self.beta * (said.ratios - said.baseline)
        losses = torch.where(good, self.desirable * (-gains).sigmoid(), self.undesirable * gains.sigmoid())
        figures = {"accuracy": ((gains > 0) == good).to(losses), "length": said.tokens}
        return Judged(losses, {name: one.detach() for name, one in figures.items()})
