"""What rewards say of completions and of their tokens: K completions, those of one prompt next to each other; N tokens,
those of one completion next to each other and in order.

Deviations are those of a sample (over n - 1), with `LEAST` beside them, as in GRPO's implementations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST = 1e-4
"""Added to deviations, so that equal rewards give 0 and no noise."""


def mean_of(each_K: Tensor, group_K: Tensor) -> Tensor:
    """The mean of its group for each completion, (K,)."""
    return _sum(each_K, group_K) / _sum(torch.ones_like(each_K), group_K)


def deviation_of(each_K: Tensor, group_K: Tensor) -> Tensor:
    """The deviation in its group for each completion, (K,); 0 in a group of one."""
    size = _sum(torch.ones_like(each_K), group_K)
    return (_sum((each_K - mean_of(each_K, group_K)).square(), group_K) / (size - 1).clamp_min(1)).sqrt()


def _sum(each_K: Tensor, group_K: Tensor) -> Tensor:
    return each_K.new_zeros(int(group_K.max()) + 1).index_add(0, group_K, each_K)[group_K]


def centred(rewards_K: Tensor, group_K: Tensor) -> Tensor:
    """Less the mean of the group (Dr. GRPO, arXiv:2503.20783)."""
    return rewards_K - mean_of(rewards_K, group_K)


def by_group(rewards_K: Tensor, group_K: Tensor) -> Tensor:
    """Less the mean of the group, over its deviation (GRPO, arXiv:2402.03300)."""
    return centred(rewards_K, group_K) / (deviation_of(rewards_K, group_K) + LEAST)


def by_batch(rewards_K: Tensor, group_K: Tensor) -> Tensor:
    """Less the mean of the batch, over its deviation (REINFORCE++, arXiv:2501.03262)."""
    return whitened(rewards_K)


def by_group_and_batch(rewards_K: Tensor, group_K: Tensor) -> Tensor:
    """Less the mean of the group, over the deviation of the batch's rewards (arXiv:2508.08221)."""
    whole = torch.zeros_like(group_K)
    return centred(rewards_K, group_K) / (deviation_of(rewards_K, whole) + LEAST)


def leave_one_out(rewards_K: Tensor, group_K: Tensor) -> Tensor:
    """Less the mean of the others of the group (RLOO, arXiv:2402.14740); 0 in a group of one."""
    size = _sum(torch.ones_like(rewards_K), group_K)
    return centred(rewards_K, group_K) * size / (size - 1).clamp_min(1)


ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "group": by_group,
    "centred": centred,
    "batch": by_batch,
    "group_batch": by_group_and_batch,
    "leave_one_out": leave_one_out,
}


def without_signal(rewards_K: Tensor, group_K: Tensor) -> Tensor:
    """Whether the completions of a group are worth the same, by group: (G,). Then nothing is learned of it."""
    least = rewards_K.new_full((int(group_K.max()) + 1,), torch.inf).scatter_reduce(0, group_K, rewards_K, "amin")
    most = torch.full_like(least, -torch.inf).scatter_reduce(0, group_K, rewards_K, "amax")
    return most - least <= 1e-8 * most.abs().clamp_min(1)


def whitened(each: Tensor, centre: bool = True) -> Tensor:
    """Less the mean, where it is to be centred, and over the deviation."""
    if each.numel() < 2:
        return torch.zeros_like(each) if centre else each
    made = (each - each.mean()) / (each.std() + LEAST)
    return made if centre else made + each.mean()


def priced(rewards_K: Tensor, prices_N: Tensor, of_N: Tensor) -> Tensor:
    """Rewards of completions less what their tokens cost, (K,)."""
    return rewards_K.index_add(0, of_N, prices_N.to(rewards_K), alpha=-1)


def to_go(rewards_K: Tensor, prices_N: Tensor, of_N: Tensor) -> Tensor:
    """Of each token the reward of its completion less what it and the later ones cost, (N,)."""
    prices_N = prices_N.to(rewards_K)
    sums, last = torch.cumsum(prices_N, 0), last_of(of_N)
    ends = torch.zeros_like(rewards_K).index_copy(0, of_N[last], sums[last])
    return rewards_K[of_N] - (ends[of_N] - sums + prices_N)


def last_of(of_N: Tensor) -> Tensor:
    """Whether a token is the last of its completion, (N,)."""
    last = torch.ones_like(of_N, dtype=torch.bool)
    last[:-1] = of_N[1:] != of_N[:-1]
    return last


def by_token(rewards_K: Tensor, prices_N: Tensor, of_N: Tensor) -> Tensor:
    """Rewards of tokens: what each costs, and on the last of a completion what that is worth, (N,)."""
    rewards_N, last = -prices_N.to(rewards_K), last_of(of_N)
    rewards_N[last] += rewards_K[of_N[last]]
    return rewards_N


def gae(rewards_N: Tensor, values_N: Tensor, of_N: Tensor, discount: float, decay: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages (arXiv:1506.02438) and the returns that values should be, (N,) each.

    A_t = sum over l of (discount x decay)^l (r_(t+l) + discount V_(t+l+1) - V_(t+l)); after the last token V is 0.
    """
    lengths = torch.bincount(of_N) if len(of_N) else of_N
    lengths = lengths[lengths > 0]
    width = int(lengths.max()) if len(lengths) else 0
    inside = torch.arange(width, device=of_N.device)[None] < lengths[:, None]
    rewards, values = (each.new_zeros(inside.shape).masked_scatter(inside, each) for each in (rewards_N, values_N))
    made, ahead = torch.zeros_like(rewards), rewards.new_zeros(len(lengths))
    after = torch.zeros_like(ahead)
    for at in reversed(range(width)):  # what is past an end has no reward and no value
        ahead = rewards[:, at] + discount * after - values[:, at] + discount * decay * ahead
        made[:, at] = ahead = torch.where(inside[:, at], ahead, 0.0)
        after = values[:, at]
    advantages = made[inside]
    return advantages, advantages + values_N
