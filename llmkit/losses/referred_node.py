"""Losses of preference beside a reference. r is log pi(y|x) - log pi_ref(y|x) of a completion, w the chosen one, l the
rejected one, s(x) the sigmoid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from llmkit.core.config import Conflict, config, setting

if TYPE_CHECKING:
    from llmkit.losses.sides import Judged, Sides


@config
class Dpo:
    """Direct preference optimisation (arXiv:2305.18290): -log s(beta (r_w - r_l)), and losses of the same margin."""

    kind: Literal["dpo"] = "dpo"
    beta: float = setting(default=0.1, above=0.0)
    """How strongly the policy is held to the reference."""
    variant: Literal["sigmoid", "hinge", "robust", "exo", "discopop"] = "sigmoid"
    """Of the margin m = beta (r_w - r_l): `sigmoid`; `hinge`: max(0, 1 - m) (SLiC, arXiv:2305.10425); `robust`:
    unbiased where a share of the labels is flipped (arXiv:2403.00409); `exo`: KL of the policy's choice to the labels
    (arXiv:2402.00856); `discopop`: the loss that arXiv:2406.08414 found."""
    label_smoothing: float = setting(default=0.0, least=0.0, below=0.5)
    """Share of the labels that may be wrong. With `sigmoid` that is conservative DPO, and where rows have a
    `probability` of their own each pair has its share."""
    f: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """The divergence from the reference (f-DPO, arXiv:2309.16240): f'(pi / pi_ref) is in the place of r."""
    alpha: float = setting(default=0.5, above=0.0, below=1.0)
    """Of the `alpha` divergence: towards 0 it is the reverse KL, towards 1 the forward KL."""
    average: bool = False
    """Take r per token of its completion (length-normalised DPO, arXiv:2411.15124)."""
    tail: float = setting(default=1.0, least=0.0, most=1.0)
    """What tokens beyond the length of the pair's shorter completion count in r (LD-DPO, arXiv:2409.06411)."""
    temperature: float = setting(default=0.05, above=0.0, most=1.0)
    """Of `discopop`: over how much of the margin it goes from one form to the other."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = False

    @property
    def doubts(self) -> bool:
        """Whether it takes labels that are likely, each by its own chance."""
        return self.variant == "sigmoid"

    def problems(self) -> Iterator[Conflict]:
        """A share of wrong labels where none is taken, or where one is needed."""
        if self.label_smoothing and self.variant in ("hinge", "discopop"):
            fix = "remove it, or use variant: robust"
            yield Conflict("label_smoothing", f"variant {self.variant} has no wrong labels", fix, "variant")
        if self.variant == "exo" and not self.label_smoothing:
            yield Conflict(
                "variant", "exo needs label_smoothing above 0", "set label_smoothing: 0.001", "label_smoothing"
            )

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs."""
        from llmkit.losses.margins import MARGINS, SLOPES, sigmoid, wrongly
        from llmkit.losses.preference import judged, per_token, ratios

        slope, loss = SLOPES[self.f], MARGINS[self.variant]
        rewards = (slope(ratio, self.alpha) for ratio in ratios(policy, reference))
        chosen, rejected = (self.beta * one for one in (per_token(rewards, policy) if self.average else rewards))
        margins, smoothing = chosen - rejected, self.label_smoothing
        if self.doubts:
            return judged(sigmoid(margins, wrongly(policy.doubt, smoothing)), chosen, rejected, policy)
        losses = loss(margins, self.temperature if self.variant == "discopop" else smoothing)
        return judged(losses, chosen, rejected, policy)


@config
class Ipo:
    """Identity preference optimisation (arXiv:2310.12036): (r_w - r_l - 1 / (2 tau))^2; the margin has a goal and no
    pull beyond it."""

    kind: Literal["ipo"] = "ipo"
    tau: float = setting(default=0.1, above=0.0)
    """How strongly the policy is held to the reference."""
    average: bool = True
    """Take r per token of its completion: the goal then does not follow the length of texts."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = False
    tail: ClassVar[float] = 1.0

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs."""
        from llmkit.losses.preference import judged, per_token, ratios

        made = ratios(policy, reference)
        chosen, rejected = per_token(made, policy) if self.average else made
        losses = (chosen - rejected - 1 / (2 * self.tau)).square()
        return judged(losses, self.tau * chosen, self.tau * rejected, policy)


@config
class Apo:
    """Anchored preference optimisation (arXiv:2408.06266): `zero`, 1 - s(beta r_w) + s(beta r_l), raises what was
    chosen; `down`, s(beta r_w) + 1 - s(beta (r_w - r_l)), lowers both, for a model that is better than what was
    chosen."""

    kind: Literal["apo"] = "apo"
    beta: float = setting(default=0.1, above=0.0)
    """How strongly the policy is held to the reference."""
    variant: Literal["zero", "down"] = "zero"
    """Which way."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = False
    tail: ClassVar[float] = 1.0

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs."""
        from llmkit.losses.preference import judged, ratios

        chosen, rejected = (self.beta * ratio for ratio in ratios(policy, reference))
        zero = self.variant == "zero"
        losses = (-chosen).sigmoid() + rejected.sigmoid() if zero else chosen.sigmoid() + (rejected - chosen).sigmoid()
        return judged(losses, chosen, rejected, policy)


@config
class Nca:
    """Noise contrastive alignment of pairs (arXiv:2402.05369): -log s(beta r_w) - (log s(-beta r_w) + log s(-beta r_l))
    / 2; it holds the chosen text's probability, not the margin alone."""

    kind: Literal["nca"] = "nca"
    beta: float = setting(default=0.1, above=0.0)
    """How strongly the policy is held to the reference."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = False
    tail: ClassVar[float] = 1.0

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs."""
        from llmkit.losses.margins import sigmoid
        from llmkit.losses.preference import judged, ratios

        chosen, rejected = (self.beta * ratio for ratio in ratios(policy, reference))
        losses = sigmoid(chosen) + (sigmoid(-chosen) + sigmoid(-rejected)) / 2
        return judged(losses, chosen, rejected, policy)


@config
class Bco:
    """Binary classifier optimisation (arXiv:2404.04656) of pairs: -log s(beta r_w) - log s(-beta r_l), without the
    shift by a running mean of rewards."""

    kind: Literal["bco"] = "bco"
    beta: float = setting(default=0.1, above=0.0)
    """How strongly the policy is held to the reference."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = False
    tail: ClassVar[float] = 1.0

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs."""
        from llmkit.losses.margins import sigmoid
        from llmkit.losses.preference import judged, ratios

        chosen, rejected = (self.beta * ratio for ratio in ratios(policy, reference))
        return judged(sigmoid(chosen) + sigmoid(-rejected), chosen, rejected, policy)


@config
class Sppo:
    """Self-play preference optimisation (arXiv:2405.00675) with certain labels:
    (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2."""

    kind: Literal["sppo"] = "sppo"
    beta: float = setting(default=0.1, above=0.0)
    """How strongly the policy is held to the reference."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = False
    tail: ClassVar[float] = 1.0

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs."""
        from llmkit.losses.preference import judged, ratios

        (chosen, rejected), goal = ratios(policy, reference), 1 / (2 * self.beta)
        losses = (chosen - goal).square() + (rejected + goal).square()
        return judged(losses, self.beta * chosen, self.beta * rejected, policy)


@config
class Aot:
    """Alignment by optimal transport (arXiv:2406.05882): a DPO loss of sorted margins, so that the distribution of what
    was chosen is above that of what was rejected. It compares all pairs of a step."""

    kind: Literal["aot"] = "aot"
    beta: float = setting(default=0.1, above=0.0)
    """How strongly the policy is held to the reference."""
    paired: bool = True
    """Sort the policy's margins and the reference's; otherwise r of chosen and of rejected completions."""
    label_smoothing: float = setting(default=0.0, least=0.0, below=0.5)
    """Share of the labels that may be wrong."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = True
    tail: ClassVar[float] = 1.0

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs, in the order of the sorted margins."""
        from llmkit.losses.margins import sigmoid
        from llmkit.losses.preference import judged, ratios, sorted_margins

        chosen, rejected = ratios(policy, reference)
        margins = self.beta * sorted_margins(policy, (chosen, rejected), self.paired)
        return judged(sigmoid(margins, self.label_smoothing), self.beta * chosen, self.beta * rejected, policy)
