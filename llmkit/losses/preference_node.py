"""The `loss` union of preference: over the two completions of P prompts, of which one was chosen. Light.

A node says what it reads: `needs_reference`, the reference's log-probabilities beside the policy's; `tail`, what a
token beyond the length of the pair's shorter completion counts in its sum; `whole_step`, all pairs of a step at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from llmkit.core.config import Conflict, config, setting
from llmkit.core.hints import kind_of
from llmkit.losses.direct_node import Cpo, Nll, Orpo, SimPo
from llmkit.losses.own_node import OwnPairs
from llmkit.losses.referred_node import Aot, Apo, Bco, Dpo, Ipo, Nca, Sppo
from llmkit.losses.sides import Judged, Sides

__all__ = ["Judged", "Mixture", "Part", "PreferenceLoss", "Sides", "SingleLoss"]

SingleLoss = Dpo | Ipo | SimPo | Orpo | Cpo | Apo | Nca | Bco | Sppo | Aot | Nll | OwnPairs


@config
class Part:
    """A loss in a mixture."""

    loss: SingleLoss
    """Any loss of preference, or `nll`, the likelihood of what was chosen."""
    weight: float = setting(default=1.0, above=0.0)
    """What it counts."""


@config
class Mixture:
    """A weighted sum of losses: RPO (arXiv:2404.19733) is dpo and nll, MPO (arXiv:2411.10442) dpo, bco and nll,
    CPO-SimPO simpo and nll. The rewards that are logged are those of its first part."""

    kind: Literal["mixture"] = "mixture"
    parts: tuple[Part, ...]
    """The losses and their weights."""

    def problems(self) -> Iterator[Conflict]:
        """Nothing to sum, or sums of tokens that differ."""
        if not self.parts:
            yield Conflict("parts", "holds no loss", "give one or more {loss: ..., weight: ...}")
        if len({part.loss.tail for part in self.parts if not isinstance(part.loss, Nll)}) > 1:
            yield Conflict("parts", "its losses count tails differently", "give dpo the same tail in all parts, or 1.0")

    @property
    def needs_reference(self) -> bool:
        """Whether one of them compares with a reference."""
        return any(part.loss.needs_reference for part in self.parts)

    @property
    def whole_step(self) -> bool:
        """Whether one of them compares all pairs of a step."""
        return any(part.loss.whole_step for part in self.parts)

    @property
    def tail(self) -> float:
        """What tokens beyond the shorter completion's length count."""
        return min(part.loss.tail for part in self.parts)

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The weighted sum for each pair; each part's own loss beside it, by its place and kind."""
        made = [part.loss(policy, reference) for part in self.parts]
        first, *others = (part.weight * one.losses for part, one in zip(self.parts, made, strict=True))
        kinds = (kind_of(type(part.loss)) for part in self.parts)
        own = {f"loss_{at}_{kind}": one.losses.detach() for at, (kind, one) in enumerate(zip(kinds, made, strict=True))}
        return Judged(sum(others, start=first), {**made[0].figures, **own})


PreferenceLoss = SingleLoss | Mixture
