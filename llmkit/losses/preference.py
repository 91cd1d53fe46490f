"""Arithmetic of preference losses: N scored positions of K = 2 P completions; all that is per pair is (P,), in fp64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from llmkit.core.types import Batch, Branches, Scores
from llmkit.losses.sides import Judged, Sides


def sides(scores: Tensor | Scores, batch: Batch, tail: float = 1.0) -> Sides:
    """The sums of a batch whose branches are pairs, the chosen completion first.

    Raises:
        ValueError: the batch has no branches, or an odd number of them.
    """
    branches = batch.branches
    if branches is None or len(branches.group) % 2:
        raise ValueError("a preference loss takes batches of pairs of completions")
    logps_N = (scores.logps if isinstance(scores, Scores) else scores).double()
    tokens_P2 = summed(torch.ones_like(logps_N), branches).reshape(-1, 2)
    sums_P2 = whole_P2 = summed(logps_N, branches).reshape(-1, 2)
    if tail != 1:
        sums_P2 = summed(logps_N * within(branches, tokens_P2, tail), branches).reshape(-1, 2)
    doubt_P2 = branches.per["doubt"].to(sums_P2).reshape(-1, 2) if "doubt" in branches.per else None
    doubt_P = None if doubt_P2 is None else doubt_P2[:, 0]
    return Sides(sums_P2[:, 0], sums_P2[:, 1], tokens_P2[:, 0], tokens_P2[:, 1], whole_P2[:, 0], doubt_P)


def summed(each_N: Tensor, branches: Branches) -> Tensor:
    """(K,): the sum over each completion's tokens."""
    return each_N.new_zeros(len(branches.group)).index_add(0, branches.of, each_N)


def within(branches: Branches, tokens_P2: Tensor, tail: float) -> Tensor:
    """(N,): 1 for tokens within the length that both completions of their pair have, `tail` beyond it."""
    order_N = torch.arange(len(branches.of), device=branches.of.device)
    first_K = order_N.new_full((len(branches.group),), len(order_N)).scatter_reduce(0, branches.of, order_N, "amin")
    shared_N = tokens_P2.amin(1)[branches.of // 2]
    return torch.where(order_N - first_K[branches.of] < shared_N, 1.0, tail)


def ratios(policy: Sides, reference: Sides | None) -> tuple[Tensor, Tensor]:
    """log pi - log pi_ref of the chosen and of the rejected completions.

    Raises:
        ValueError: there is no reference.
    """
    if reference is None:
        raise ValueError("this loss compares with a reference")
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def per_token(both: Iterable[Tensor], policy: Sides) -> tuple[Tensor, Tensor]:
    """What there is of chosen and rejected completions, over how many tokens they have."""
    chosen, rejected = both
    return chosen / policy.chosen_tokens.clamp_min(1), rejected / policy.rejected_tokens.clamp_min(1)


def means(policy: Sides) -> tuple[Tensor, Tensor]:
    """The log-probabilities of chosen and rejected completions per token."""
    return per_token((policy.chosen, policy.rejected), policy)


def sorted_margins(policy: Sides, both: tuple[Tensor, Tensor], paired: bool) -> Tensor:
    """How far each quantile of one side is above that of the other.

    Of `both`, the ratios of the completions: sorted margins of the policy less those of the reference, or sorted ratios
    of the chosen less those of the rejected completions.
    """
    chosen, rejected = both
    if not paired:
        return chosen.sort().values - rejected.sort().values
    margins = policy.chosen - policy.rejected
    return margins.sort().values - (margins - chosen + rejected).sort().values


def judged(
    losses: Tensor, chosen: Tensor, rejected: Tensor, policy: Sides, more: Mapping[str, Tensor] | None = None
) -> Judged:
    """Losses with the figures of a pair, from what the loss takes for the completions' rewards."""
    rewards = {"reward_chosen": chosen, "reward_rejected": rejected, "reward_margin": chosen - rejected}
    own = {"accuracy": (chosen > rejected).to(chosen), "logps_chosen": policy.chosen, "logps_rejected": policy.rejected}
    lengths = {"length_chosen": policy.chosen_tokens, "length_rejected": policy.rejected_tokens}
    made = {**rewards, **own, **lengths, **(more or {})}
    return Judged(losses, {name: figure.detach() for name, figure in made.items()})
