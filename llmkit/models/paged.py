"""Blocks of cached keys and values: the store that `Paged` needs, without the engine that will schedule it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from llmkit_kernels.paged.laid import Held, Laid, lay, rounded
from torch import Tensor

from llmkit.core.types import Span


class BlockStore:
    """`blocks` blocks of `size` tokens, for every layer.

    Sequences may share blocks (a common prefix); the caller sees to it that no shared block is written twice. Layers
    that were not reserved are made at first use.
    """

    def __init__(self, blocks: int, size: int, dtype: torch.dtype | None = None) -> None:
        """`dtype`: fp32, bf16, fp16 or int8 (a factor for each head of a token); without one, as keys come."""
        self.blocks, self.size, self.dtype = blocks, size, dtype
        self.layers: dict[int, Held] = {}

    def lay(self, spans: Sequence[Span]) -> Laid:
        """What follows from the spans of a step, for all layers.

        Raises:
            ValueError: they overlap, one names too few blocks or one that does not exist, or one is no tree.
        """
        if any(span.row for span in spans):
            raise ValueError("spans over cached keys lie in row 0")
        return lay([(one.start, one.end, one.past, one.blocks, one.parents) for one in spans], self.size, self.blocks)

    def held(self, layer: int, keys: Tensor, values: Tensor) -> Held:
        """The blocks of a layer, made for such keys (KV, T, D) and values (KV, T, Dv) if there are none."""
        if layer not in self.layers:
            self.layers[layer] = self._made(keys, values)
        return self.layers[layer]

    def write(self, layer: int, keys: Tensor, values: Tensor, laid: Laid) -> None:
        """Stores the new keys (KV, T, D) and values (KV, T, Dv) of a step."""
        held = self.held(layer, keys, values)
        slots = laid.on(keys.device)[0]
        taken = slots >= 0
        block, at = slots[taken] // self.size, slots[taken] % self.size
        for new, store, scales, turned in (
            (keys, held.keys, held.key_scales, True),
            (values, held.values, held.value_scales, False),
        ):
            rows = new.detach().transpose(0, 1)[: len(slots)][taken]
            if scales is not None:
                rows, scales[block, :, at] = quantised(rows)
            if turned:
                store[block, :, :, at] = rows.to(store.dtype)
            else:
                store[block, :, at, : held.size] = rows.to(store.dtype)

    def read(self, layer: int, laid: Laid, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the sequence of a span, (KV, past + L, D) and (KV, past + L, Dv), as `like`'s type."""
        start, end, past = laid.runs[index][:3]
        held, length = self.layers[layer], past + end - start
        first = int(laid.spans[index, 3])
        used = laid.on(like.device)[1][first : first + -(-length // self.size)]
        keys = _read(held.keys, held.key_scales, used, like).transpose(2, 3)
        values = _read(held.values.transpose(2, 3), held.value_scales, used, like).transpose(2, 3)
        flat = [x[:, :, : self.size].transpose(0, 1).flatten(1, 2)[:, :length] for x in (keys, values)]
        return flat[0], flat[1][..., : held.size]

    def copy(self, source: int, target: int) -> None:
        """Copies all that a block holds into another."""
        for held in self.layers.values():
            for store in (held.keys, held.values, held.key_scales, held.value_scales):
                if store is not None:
                    store[target] = store[source]

    def _made(self, keys: Tensor, values: Tensor) -> Held:
        dtype, lanes = self.dtype or keys.dtype, rounded(self.size)
        key = keys.new_zeros(self.blocks, keys.shape[0], keys.shape[2], lanes, dtype=dtype)
        value = values.new_zeros(self.blocks, keys.shape[0], lanes, rounded(values.shape[2]), dtype=dtype)
        scales = [
            keys.new_zeros(self.blocks, keys.shape[0], lanes, dtype=torch.float32) if dtype == torch.int8 else None
            for _ in range(2)
        ]
        return Held(key, value, self.size, values.shape[2], *scales)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) -> whole numbers up to 127 as int8, and the factor (...) in fp32 of each row; what is not finite gives a
    factor that is no number."""
    wide = x.float()
    factor = wide.abs().amax(-1) / 127
    whole = (wide / factor[..., None]).round().clamp(-127, 127).nan_to_num(0.0)
    return whole.to(torch.int8), torch.where(factor.isfinite(), factor, torch.nan)


def _read(store: Tensor, scales: Tensor | None, used: Tensor, like: Tensor) -> Tensor:
    """(blocks, KV, D, lanes) of the blocks used."""
    there = store[used]
    return there.to(like.dtype) if scales is None else (there * scales[used][:, :, None]).to(like.dtype)
