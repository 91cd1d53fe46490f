"""What `causal` means, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def causal(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[tuple[int, int]], scale: float, window: int = 0
) -> Tensor:
    """As `llmkit_kernels.attention.causal`, segment by segment with a dense mask."""
    groups = q.shape[0] // k.shape[0]
    out = q.new_zeros(q.shape[1], q.shape[0], v.shape[2])
    for start, end in segments:
        at = torch.arange(end - start)
        seen = at[None] <= at[:, None]
        if window:
            seen &= at[None] > at[:, None] - window
        keys, values = (x[:, start:end].repeat_interleave(groups, 0) for x in (k, v))
        scores = (q[:, start:end] @ keys.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        here = (torch.softmax(scores, -1) @ values).transpose(0, 1)
        out = torch.cat([out[:start], here, out[end:]])
    return out
