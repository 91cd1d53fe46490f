"""The `loss` union of preference: over the two completions of P prompts, of which one was chosen. Light.

A node says what it reads: `needs_reference`, the reference's log-probabilities beside the policy's; `tail`, what a
token beyond the length of the pair's shorter completion counts in its sum; `whole_step`, all pairs of a step at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from llmkit.core.config import config, setting

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


class Judged(NamedTuple):
    """The losses of P pairs, and what is logged of them, (P,) each."""

    losses: Tensor
    figures: Mapping[str, Tensor]
    """`reward_chosen`, `reward_rejected`, `reward_margin`, `accuracy`, `logps_chosen`, ...: without gradient."""


@config
class Dpo:
    """Direct preference optimisation (arXiv:2305.18290): -log sigmoid(beta (r_chosen - r_rejected)), where r is the log
    of the policy's probability over the reference's."""

    kind: Literal["dpo"] = "dpo"
    beta: float = setting(default=0.1, above=0.0)
    """How strongly the policy is held to the reference."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = False
    tail: float = setting(default=1.0, least=0.0, most=1.0)
    """What tokens beyond the length of the pair's shorter completion count (LD-DPO, arXiv:2409.06411)."""

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs."""
        from llmkit.losses.preference import judged, ratios, sigmoid

        chosen, rejected = ratios(policy, reference)
        chosen, rejected = self.beta * chosen, self.beta * rejected
        return judged(sigmoid(chosen - rejected), chosen, rejected, policy)


PreferenceLoss = Dpo
