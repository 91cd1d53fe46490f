"""What `causal` means, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Sequence[tuple[int, int]],
    scale: float,
    window: int = 0,
    parents: Sequence[int] = (),
) -> Tensor:
    """As `llmkit_kernels.attention.causal`, segment by segment with a dense mask."""
    groups = q.shape[0] // k.shape[0]
    out = q.new_zeros(q.shape[1], q.shape[0], v.shape[2])
    seen_by = list[list[int]]()
    for index, (start, end) in enumerate(segments):
        before = seen_by[parents[index]] if parents and parents[index] >= 0 else []
        seen_by.append([*before, *range(start, end)])
        keys, values = (x[:, seen_by[index]].repeat_interleave(groups, 0) for x in (k, v))
        at = torch.arange(keys.shape[1])
        seen = at[None] <= at[len(before) :, None]
        if window:
            seen &= at[None] > at[len(before) :, None] - window
        scores = (q[:, start:end] @ keys.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        here = (torch.softmax(scores, -1) @ values).transpose(0, 1)
        out = torch.cat([out[:start], here, out[end:]])
    return out
