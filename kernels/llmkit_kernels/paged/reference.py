"""What paged attention means, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    past: int,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    parents: Sequence[int] = (),
) -> Tensor:
    """One span: q (H, L, D) over keys (KV, past + L, D) and values (KV, past + L, Dv) of its sequence -> (L, H, Dv)."""
    length, groups = q.shape[1], q.shape[0] // keys.shape[0]
    seen, places = _seen(length, parents)
    at = torch.cat([torch.arange(past), past + places])
    mask = torch.cat([torch.ones(length, past, dtype=torch.bool), seen], 1)
    if window:
        mask &= at[None] > at[past:, None] - window
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    scores = q @ keys.transpose(1, 2) * scale
    if cap:
        scores = torch.tanh(scores / cap) * cap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, length, 1)], 2)
    weights = torch.softmax(scores, -1)[..., : at.shape[0]]
    return (weights @ values).transpose(0, 1)


def _seen(length: int, parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which tokens of a span a token of it sees, and how many of those come before it."""
    seen = torch.eye(length, dtype=torch.bool)
    for token, parent in enumerate(parents or range(-1, length - 1)):
        if parent >= 0:
            seen[token] |= seen[parent]
    return seen, seen.sum(1) - 1
