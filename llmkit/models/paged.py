"""Blocks of cached keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit.core.types import Span


class BlockStore:
    """For every layer two tensors (blocks, size, KV, D), made at first use with that layer's shapes."""

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, size
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new (KV, L, D) of a span; gives all of its sequence, (KV, past + L, D)."""
        if layer not in self.layers:
            shape = (self.blocks, self.size)
            made = [t.new_zeros(*shape, t.shape[0], t.shape[2]) for t in (keys, values)]
            self.layers[layer] = made[0], made[1]
        length = span.past + keys.shape[1]
        table = torch.tensor(span.blocks, device=keys.device)
        places = torch.arange(span.past, length, device=keys.device)
        where = table[places // self.size], places % self.size
        held = self.layers[layer]
        for store, new in zip(held, (keys, values), strict=True):
            store[where] = new.transpose(0, 1)
        return self._all(held[0], table, length), self._all(held[1], table, length)

    def _all(self, store: Tensor, table: Tensor, length: int) -> Tensor:
        used = table[: -(-length // self.size)]
        return store[used].flatten(0, 1)[:length].transpose(0, 1)
