"""From rewards and a critic's values to what PPO's loss takes: an advantage and a return for each token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from llmkit.losses.kl import ESTIMATES
from llmkit.rl.advantages import by_token, gae, whitened
from llmkit.rl.gae_node import Gae
from llmkit.rl.learned import Learned

Each = Sequence[Sequence[float]]
"""Of each completion's tokens."""


def valued(
    how: Gae, price: float, divergences: Each | None, rewards: Sequence[float], values: Each, weights: Each
) -> Learned:
    """What completions with these rewards teach, where `price` is what a divergence of a token costs; tokens of weight
    0 are those of others, and are passed over."""
    worth, mine = torch.tensor(rewards, dtype=torch.float64), _flat(weights) != 0
    of = torch.repeat_interleave(torch.arange(len(values)), torch.tensor([len(own) for own in values]))
    apart = torch.zeros(len(of), dtype=torch.float64) if divergences is None else _flat(divergences)
    of, apart, before = of[mine], apart[mine], _flat(values)[mine]
    given = by_token(worth, price * apart, of)
    given = whitened(given, centre=False) if how.whiten_rewards else given
    advantages, returns = gae(given, before, of, how.discount, how.decay)
    made = {"advantage": whitened(advantages) if how.whiten else advantages, "return": returns}
    per = {"explained": [explained(before, returns)] * len(worth)}
    if divergences is not None:
        whole = torch.zeros_like(worth).index_add(0, of, apart)
        per |= {"divergence": whole.tolist(), "penalty": (price * whole).tolist(), "beta": [price] * len(worth)}
    ends = np.cumsum([0, *map(len, values)]).tolist()
    return Learned(per, {name: _spread(each, mine, ends) for name, each in made.items()})


def divergences(estimate: str, old: Each, reference: Each) -> list[list[float]]:
    """Estimates of KL(policy, reference), token by token."""
    made = ESTIMATES[estimate](_flat(old), _flat(reference)).tolist()
    ends = np.cumsum([0, *map(len, old)]).tolist()
    return [made[a:b] for a, b in pairwise(ends)]


def explained(values: Tensor, returns: Tensor) -> float:
    """The share of the returns' variance that values foretell: 1 - Var(R - V) / Var(R); 0 where they do not vary."""
    whole = returns.var(unbiased=False) if len(returns) else returns.sum()
    return float(1 - (returns - values).var(unbiased=False) / whole) if float(whole) > 0 else 0.0


def _flat(given: Each) -> Tensor:
    return torch.tensor([x for own in given for x in own], dtype=torch.float64)


def _spread(each: Tensor, mine: Tensor, ends: Sequence[int]) -> list[list[float]]:
    whole = torch.zeros(len(mine), dtype=each.dtype).masked_scatter(mine, each)
    return [whole[a:b].tolist() for a, b in pairwise(ends)]
