"""NEFTune (arXiv:2310.05914): noise on the embeddings of a batch in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.core.types import Batch


class Noise:
    """Hooks an embedding: each of its outputs gets uniform noise of +-alpha / sqrt(L d) while a batch is `over` it.

    L is the length of the token's own sequence and d the width. The draws are those of torch's generator, which is
    seeded for each micro-batch: a run that goes on draws the same.
    """

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self.sizes: Tensor | None = None
        embedding.register_forward_hook(self._add)

    @contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        """While it lasts, what is embedded are this batch's tokens."""
        self.sizes = lengths(batch)
        try:
            yield
        finally:
            self.sizes = None

    def _add(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        if self.sizes is None:
            return None
        most = self.alpha / (self.sizes * out.shape[2]).sqrt()
        drawn = torch.rand(out.shape, device=out.device, dtype=torch.float32).mul_(2).sub_(1)
        return out + drawn.mul_(most.nan_to_num(posinf=0.0)[..., None]).to(out.dtype)


def lengths(batch: Batch) -> Tensor:
    """The length of each token's own sequence, (B, T) in fp32; 0 for padding."""
    sizes = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
    if batch.attend is None:
        for row, length in enumerate(batch.lengths):
            sizes[row, :length] = length
        return sizes
    for segment in batch.attend.segments:
        sizes[segment.row, segment.start : segment.end] = segment.end - segment.start
    return sizes
