"""From rewards to what a loss over policies takes: advantages of completions or of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from llmkit.losses.kl import ESTIMATES
from llmkit.losses.over_policy_node import OverPolicy
from llmkit.rl.advantages import ADVANTAGES, priced, to_go, whitened, without_signal


@dataclass(frozen=True)
class Learned:
    """What K completions teach."""

    per: dict[str, list[float]]
    """(K,) each."""
    each: dict[str, list[list[float]]]
    """Of each completion's tokens."""


def learned(
    loss: OverPolicy,
    advantage: str,
    rewards: Sequence[float],
    groups: Sequence[int],
    old: Sequence[Sequence[float]] | None,
    reference: Sequence[Sequence[float]] | None,
    weights: Sequence[Sequence[float]],
) -> Learned:
    """Advantages of completions with these rewards, in these groups (0, 1, ... rising); `old` and `reference` have the
    log-probabilities of their tokens, where a divergence is part of the reward; of weight 0 are those of others."""
    worth, group = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)
    same = without_signal(worth, group)[group].double()
    per = {"groups_without_signal": same.tolist()}
    if not (loss.beta and loss.penalty == "reward"):
        return Learned(per | {"advantage": ADVANTAGES[advantage](worth, group).tolist()}, {})
    if old is None or reference is None:
        raise ValueError("a price in the reward without log-probabilities")
    of, before, after = _flat(old, reference)
    prices = loss.beta * ESTIMATES[loss.kl](before, after)
    per["penalty"] = (worth - priced(worth, prices, of)).tolist()
    if advantage != "batch":
        return Learned(per | {"advantage": ADVANTAGES[advantage](priced(worth, prices, of), group).tolist()}, {})
    made, mine = to_go(worth, prices, of), torch.tensor([x != 0 for own in weights for x in own])
    made[mine] = whitened(made[mine])
    ends = np.cumsum([0, *map(len, old)]).tolist()
    return Learned(per, {"advantage": [made[a:b].tolist() for a, b in pairwise(ends)]})


def _flat(old: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor, Tensor]:
    of = torch.repeat_interleave(torch.arange(len(old)), torch.tensor([len(own) for own in old]))
    before, after = (torch.tensor([x for own in given for x in own], dtype=torch.float64) for given in (old, reference))
    return of, before, after
