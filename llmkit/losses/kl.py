"""Estimates of KL(policy, reference) from tokens that the policy drew (http://joschu.net/blog/kl-approx.html).

With d = log policy - log reference of a token: k1 = d has the right mean and a large variance; k2 = d^2 / 2 is biased
and never negative; k3 = exp(-d) - 1 + d is unbiased and never negative. As a loss an estimate counts by its gradient:
k1's is 0 in the mean and k3's is that of KL(reference, policy), unless each is multiplied by the ratio of the policy to
the one that drew, token by token, through which the gradient then goes too (`corrected`); k2's gradient is right as
it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def k1(logps: Tensor, reference: Tensor) -> Tensor:
    """log policy - log reference."""
    return logps - reference


def k2(logps: Tensor, reference: Tensor) -> Tensor:
    """Half its square."""
    return (logps - reference).square() / 2


def k3(logps: Tensor, reference: Tensor) -> Tensor:
    """reference / policy - 1 - log(reference / policy)."""
    return torch.expm1(reference - logps) - (reference - logps)


ESTIMATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def corrected(name: str, logps: Tensor, reference: Tensor, ratio: Tensor) -> Tensor:
    """An estimate (N,) whose gradient is that of KL(policy, reference) over tokens of the policy before the update."""
    made = ESTIMATES[name](logps, reference)
    return made * (ratio.detach() if name == "k2" else ratio)
