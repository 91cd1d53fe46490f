"""Where a new head begins: what it reads foretells the model's next hidden state as well as a linear map can."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llmkit.models.draft_taught import Taught

ROWS = 65536
"""Rows that are looked at: some hundred for each direction of what is read."""
RIDGE = 1e-2
"""What is added to the squares of each direction, as a share of their mean."""


@torch.no_grad()
def fit(taught: Taught, texts: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Sets a head's linear layer to least squares over rows of these texts, tokens and their weights as targets (L,)
    each, and its last norm to the scale of what the model's own head reads. What the model makes for it is kept for the
    training.

    The regression of EAGLE (arXiv:2401.15077), solved instead of trained.
    """
    head, count, square = taught.head, 0, 0.0
    inner = torch.zeros(head.near.in_features, head.near.in_features, dtype=torch.float64)
    cross = torch.zeros(head.near.in_features, head.shape.width, dtype=torch.float64)
    for tokens, weights in texts:
        read, told = (part[weights[2:] > 0] for part in _rows(taught, tokens))
        inner += (read.T @ read).cpu().double()
        cross += (read.T @ told).cpu().double()
        count, square = count + len(told), square + float(told.square().sum())
        if count >= ROWS:
            break
    if count:
        inner.diagonal().add_(RIDGE * inner.diagonal().mean())
        head.near.weight.copy_(torch.linalg.solve(inner, cross).T)
        head.norm.weight.fill_((square / count / head.shape.width) ** 0.5)


def _rows(taught: Taught, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of each place but the last two what the head reads in its first step, (L - 2, E + H), and the model's hidden
    state that says what is to be drafted there, (L - 2, H)."""
    states = taught.states(tokens).unflatten(-1, (len(taught.taps), -1))
    features = taught.head.features(states[:-2, : len(taught.head.taps)].unbind(1))
    return taught.head.mixed(tokens[1:-1], features), states[1:-1, taught.last]
