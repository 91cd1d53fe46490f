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


class Judged(NamedTuple):
    """The losses of P pairs, and what is logged of them, (P,) each."""

    losses: Tensor
    figures: Mapping[str, Tensor]
    """`reward_chosen`, `reward_rejected`, `reward_margin`, `accuracy`, `logps_chosen`, ...: without gradient."""
