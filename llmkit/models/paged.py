"""Blocks of cached keys and values: the store that `Paged` needs, without the engine that will schedule it."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit.core.types import Span


class BlockStore:
    """For every layer two tensors (blocks, size, KV, D), made at first use with that layer's shapes.

    Sequences may share blocks (a common prefix); the caller sees to it that no shared block is written twice.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, size
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new (KV, L, D) of a span; gives all of its sequence, (KV, past + L, D).

        Raises:
            ValueError: the span names too few blocks, or one that does not exist.
        """
        length = span.past + keys.shape[1]
        if length > len(span.blocks) * self.size:
            raise ValueError(f"{length} tokens need {-(-length // self.size)} blocks; the span has {len(span.blocks)}")
        if wrong := [block for block in span.blocks if not 0 <= block < self.blocks]:
            raise ValueError(f"block {wrong[0]} does not exist; the store has {self.blocks}")
        table = torch.tensor(span.blocks, device=keys.device)
        places = torch.arange(span.past, length, device=keys.device)
        where = table[places // self.size], places % self.size
        held = self._layer(layer, keys, values)
        for store, new in zip(held, (keys, values), strict=True):
            store[where] = new.detach().transpose(0, 1).to(store.dtype)
        return self._all(held[0], table, length), self._all(held[1], table, length)

    def copy(self, source: int, target: int) -> None:
        """Copies all that a block holds into another."""
        for held in self.layers.values():
            for store in held:
                store[target] = store[source]

    def _layer(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            made = [t.new_zeros(self.blocks, self.size, t.shape[0], t.shape[2]) for t in (keys, values)]
            self.layers[layer] = made[0], made[1]
        return self.layers[layer]

    def _all(self, store: Tensor, table: Tensor, length: int) -> Tensor:
        used = table[: -(-length // self.size)]
        return store[used].flatten(0, 1)[:length].transpose(0, 1)
