"""Losses of the margin m between two rewards, (P,) each, and what is in a reward's place under other divergences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid(margins: Tensor, wrong: float | Tensor = 0.0) -> Tensor:
    """-(1 - e) log s(m) - e log s(-m), of a share e of labels that may be wrong, or of each its own."""
    right = -logsigmoid(margins)
    return right + wrong * margins if isinstance(wrong, Tensor) or wrong else right  # log s(m) - log s(-m) is m


def wrongly(doubt: Tensor | None, smoothing: float) -> float | Tensor:
    """How likely each label is wrong: one that is in doubt by itself may be flipped as any other beside."""
    return smoothing if doubt is None else doubt + smoothing * (1 - 2 * doubt)


def hinge(margins: Tensor, wrong: float = 0.0) -> Tensor:
    """max(0, 1 - m)."""
    return (1 - margins).clamp_min(0)


def robust(margins: Tensor, wrong: float) -> Tensor:
    """(-(1 - e) log s(m) + e log s(-m)) / (1 - 2 e): in expectation over labels of which a share e is flipped, the
    loss of the true ones."""
    return (-(1 - wrong) * logsigmoid(margins) + wrong * logsigmoid(-margins)) / (1 - 2 * wrong)


def exo(margins: Tensor, wrong: float) -> Tensor:
    """KL of (s(m), s(-m)) to (1 - e, e)."""
    chosen, rejected = margins.sigmoid(), (-margins).sigmoid()
    return chosen * (logsigmoid(margins) - math.log1p(-wrong)) + rejected * (logsigmoid(-margins) - math.log(wrong))


def discopop(margins: Tensor, temperature: float) -> Tensor:
    """-(1 - g) log s(m) + g exp(-m), with g = s(m / temperature)."""
    gate = margins / temperature
    return (-gate).sigmoid() * -logsigmoid(margins) + (logsigmoid(gate) - margins).exp()


MARGINS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "robust": robust,
    "exo": exo,
    "discopop": discopop,
}
"""Each takes the margin and its one setting."""

STEEPEST = math.log(torch.finfo(torch.float32).max) / 2
"""What is the exponent of no more than fp32 can hold the square of, as a gradient's norm has it."""


def growing(exponents: Tensor) -> Tensor:
    """e^x - 1, beyond `STEEPEST` going on in a straight line: finite, and so is its slope."""
    beyond = math.exp(STEEPEST) * (exponents - STEEPEST) + math.expm1(STEEPEST)
    return torch.where(exponents > STEEPEST, beyond, exponents.clamp_max(STEEPEST).expm1())


SLOPES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda ratio, alpha: ratio,
    "forward_kl": lambda ratio, alpha: -1 - growing(-ratio),
    "js": lambda ratio, alpha: logsigmoid(ratio),
    "alpha": lambda ratio, alpha: -growing(-alpha * ratio) / alpha,
}
"""f'(u) of a divergence, up to a constant, from log u and alpha: log u; -1 / u; log(u / (1 + u)) and
(1 - u^-alpha) / alpha."""


def log_odds(logps: Tensor) -> Tensor:
    """log P - log(1 - P) from log P, which is held below 0 by what fp32 can tell from it."""
    logps = logps.clamp_max(-torch.finfo(torch.float32).eps)
    return logps - (-logps.expm1()).log()
