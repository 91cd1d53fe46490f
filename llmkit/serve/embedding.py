"""The vector of one text, read in parts: between two of them the engine's steps go on."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit.core.types import Paged, Span
from llmkit.inference.request import RequestError
from llmkit.inference.runner import Forward
from llmkit.models.paged import BlockStore

BLOCK = 64


class Text:
    """Reads a text; its keys and values lie in a store of its own, of which nothing is kept."""

    def __init__(self, forward: Forward, ids: list[int], before: int, adapter: str) -> None:
        """`before`: virtual tokens at its beginning, which are no part of the vector."""
        self.forward, self.ids, self.before, self.adapter = forward, ids, before, adapter
        self.blocks = tuple(range(-(-len(ids) // BLOCK)))
        self.store = BlockStore(len(self.blocks), BLOCK)
        self.read = 0
        """Tokens, from the beginning."""
        self.sum: Tensor | float = 0.0
        """(H,) of the hidden states so far, in fp64: parts are as long as others leave room for, and no bit of the
        vector is to depend on that."""
        self.last: Tensor | None = None
        """(H,)."""

    @property
    def done(self) -> bool:
        """Whether all of it is read."""
        return self.read == len(self.ids)

    @torch.no_grad()
    def advance(self, most: int) -> None:
        """Reads at most so many tokens.

        Raises:
            RequestError: a device has no memory for so long a text, which has no place in the cache.
        """
        start, end, device = self.read, min(self.read + most, len(self.ids)), self.forward.device
        tokens = torch.tensor(self.ids[start:end], device=device)
        attend = Paged(self.store, (Span(0, 0, end - start, start, self.blocks),))
        try:
            hidden = self.forward.hidden(tokens, torch.arange(start, end, device=device), attend, [self.adapter])
        except torch.OutOfMemoryError as cause:
            what = f"there is no memory for a text of {len(self.ids)} tokens"
            raise RequestError(what, fix="send a shorter one", key="input") from cause
        own = hidden[max(0, self.before - start) :]
        self.read, self.sum, self.last = end, self.sum + own.sum(0, dtype=torch.float64), hidden[-1].double()

    def vector(self, pooling: str) -> list[float]:
        """The mean of its hidden states, or the last of them, of length 1; one of nothing but zeros stays so."""
        pooled = self.last if pooling == "last" else torch.as_tensor(self.sum) / (len(self.ids) - self.before)
        return list(torch.nn.functional.normalize(torch.as_tensor(pooled), dim=0).float().tolist())
