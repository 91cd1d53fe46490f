"""Losses over the scores of pairs of answers. Shapes: K answers, P pairs of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llmkit.core.types import Batch, Branches, LossSum
from llmkit.losses.margins import wrongly


def scores_of(scores: Tensor, branches: Branches) -> Tensor:
    """Scores at the positions that have a weight, one an answer, (N,) or (N, 1) -> those of the answers in their order,
    (K,), in fp32 at least."""
    flat_N = scores.reshape(-1)
    flat_N = flat_N.to(torch.promote_types(flat_N.dtype, torch.float32))
    return flat_N.new_zeros(len(branches.group)).index_copy(0, branches.of, flat_N)


def pairs_of(scores_K: Tensor, branches: Branches) -> tuple[Tensor, Tensor]:
    """Scores of the chosen answers and of the rejected ones, (P,) each, pair by pair; `per["label"]` says which is
    which.

    Raises:
        ValueError: an answer has no other beside it.
    """
    chosen_K = branches.per["label"] > 0.5
    if not torch.equal(branches.group[chosen_K], branches.group[~chosen_K]):
        raise ValueError("each prompt has one chosen answer and one rejected")
    return scores_K[chosen_K], scores_K[~chosen_K]


def bradley_terry(scores: Tensor, batch: Batch, smoothing: float, center: float) -> LossSum:
    """The sum over pairs of (1 - e) L(d) + e L(-d) + c (r+ + r-)^2; d = r+ - r-, L(x) = -log sigmoid(x - margin)."""
    branches = batch.branches
    if branches is None or not len(scores):  # a rank that has no pairs left runs one with weight 0
        none = scores.sum() * 0
        return LossSum(none, none.detach())
    up_P, down_P = pairs_of(scores_of(scores, branches), branches)
    gap_P, count = up_P - down_P, up_P.new_tensor(float(len(up_P)))
    margin_P = branches.per["margin"][branches.per["label"] > 0.5].to(gap_P) if "margin" in branches.per else 0.0
    doubt_P = branches.per["doubt"][branches.per["label"] > 0.5].to(gap_P) if "doubt" in branches.per else None
    wrong = wrongly(doubt_P, smoothing)
    each_P = -(1 - wrong) * logsigmoid(gap_P - margin_P)
    if isinstance(wrong, Tensor) or wrong:
        each_P = each_P - wrong * logsigmoid(-gap_P - margin_P)
    if center:
        each_P = each_P + center * (up_P + down_P).square()
    return LossSum(each_P.sum(), count, _figures(up_P.detach(), down_P.detach(), count))


def _figures(up_P: Tensor, down_P: Tensor, count: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """How often the chosen answer has the higher score (half, where both have the same), and what scores are like."""
    right_P = (up_P > down_P).to(up_P) + (up_P == down_P).to(up_P) / 2
    parts = {"accuracy": right_P, "reward_margin": up_P - down_P, "reward_chosen": up_P, "reward_rejected": down_P}
    return {name: (part_P.sum(), count) for name, part_P in parts.items()}
