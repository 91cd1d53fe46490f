"""What losses of preference are over, and what they give. Light."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Sides(NamedTuple):
    """What one model says of the two completions of P prompts, (P,) each, in fp64: what counts are differences of long
    sums."""

    chosen: Tensor
    """Log-probability, summed over the completion's tokens."""
    rejected: Tensor
    chosen_tokens: Tensor
    """How many tokens that is."""
    rejected_tokens: Tensor
    likelihood: Tensor | None = None
    """`chosen` with every token in full, where that counts some of them for less."""
    doubt: Tensor | None = None
    """The chance that each label is the wrong way round, where rows say it."""

    def columns(self) -> dict[str, Tensor]:
        """What the model says, by name."""
        return {name: each for name, each in self._asdict().items() if each is not None and name != "doubt"}

    @property
    def nll(self) -> Tensor:
        """The negative log-likelihood of the chosen completion, whatever a tail counts elsewhere."""
        return -(self.chosen if self.likelihood is None else self.likelihood)


class Judged(NamedTuple):
    """The losses of P pairs, and what is logged of them, (P,) each."""

    losses: Tensor
    figures: Mapping[str, Tensor]
    """`reward_chosen`, `reward_rejected`, `reward_margin`, `accuracy`, `logps_chosen`, ...: without gradient."""
