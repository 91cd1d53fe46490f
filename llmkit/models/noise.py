"""NEFTune (arXiv:2310.05914): noise on the embeddings of a batch in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.core.types import Batch, Split
from llmkit.models.lengths import lengths


class Noise:
    """Hooks an embedding: each of its outputs gets uniform noise of +-alpha / sqrt(L d) while a batch is `over` it.

    L is the length of the token's own sequence and d the width. The draws are those of torch's generator, which is
    seeded for each micro-batch: a run that goes on draws the same.
    """

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self.sizes: Tensor | None = None
        self.split: Split | None = None
        embedding.register_forward_hook(self._add)

    @contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        """While it lasts, what is embedded are this batch's tokens."""
        self.sizes, self.split = lengths(batch), batch.attend if isinstance(batch.attend, Split) else None
        try:
            yield
        finally:
            self.sizes = self.split = None

    def _add(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        if self.sizes is None:
            return None
        most = self.alpha / (self.sizes * out.shape[2]).sqrt()
        drawn = self._drawn(out).mul_(2).sub_(1)
        return out + drawn.mul_(most.nan_to_num(posinf=0.0)[..., None]).to(out.dtype)

    def _drawn(self, out: Tensor) -> Tensor:
        """From [0, 1), in the shape of `out`; of a row that several ranks hold, what one process draws there."""
        if self.split is None:
            return torch.rand(out.shape, device=out.device, dtype=torch.float32)
        shape = 1, self.split.tokens, out.shape[2]
        return self.split.cut(torch.rand(shape, device=out.device, dtype=torch.float32))
