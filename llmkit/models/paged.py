"""Blocks of cached keys and values: the store that `Paged` needs, without the engine that will schedule it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from llmkit_kernels.paged.laid import Held, Laid, lay
from torch import Tensor

from llmkit.core.types import Span


class BlockStore:
    """`blocks` blocks of `size` tokens, for every layer.

    Sequences may share blocks (a common prefix); the caller sees to it that no shared block is written twice. A layer
    is made when its first keys come; `resize` makes all of them anew and lets no more come.
    """

    def __init__(self, blocks: int, size: int, dtype: torch.dtype | None = None) -> None:
        """`dtype`: fp32, bf16, fp16 or int8 (a factor for each head of a token); without one, as keys come."""
        self.blocks, self.size, self.dtype = blocks, size, dtype
        self.layers: dict[int, Held] = {}
        self.same: dict[int, int] = {}
        """Layers that attend to the keys and values of an earlier one, and which."""
        self.came: dict[int, tuple[Tensor, Tensor]] | None = {}
        """The first keys and values of each layer until `resize`: all are kept, so that one address is one tensor."""

    @property
    def bytes(self) -> dict[torch.device, int]:
        """Of all layers, by the device on which they lie."""
        taken: dict[torch.device, int] = {}
        for tensor in (tensor for held in self.layers.values() for tensor in held.tensors):
            taken[tensor.device] = taken.get(tensor.device, 0) + tensor.nbytes
        return taken

    def resize(self, blocks: int) -> None:
        """As many blocks for the layers that there are; what they held is gone."""
        self.blocks, self.came = blocks, None
        for layer in self.layers:
            self.layers[layer] = self.layers[layer].resized(blocks)

    def lay(self, spans: Sequence[Span]) -> Laid:
        """What follows from the spans of a step, for all layers.

        Raises:
            ValueError: they overlap, one names too few blocks or one that does not exist, or one is no tree.
        """
        if any(span.row for span in spans):
            raise ValueError("spans over cached keys lie in row 0")
        return lay([(one.start, one.end, one.past, one.blocks, one.parents) for one in spans], self.size, self.blocks)

    def held(self, layer: int, keys: Tensor, values: Tensor) -> Held:
        """The blocks of a layer, made for such keys (KV, T, D) and values (KV, T, Dv) if there are none.

        Raises:
            ValueError: the layer had no keys when the store was sized.
        """
        if layer not in self.layers and layer not in self.same:
            self._meet(layer, keys, values)
        return self.layers[self.same.get(layer, layer)]

    def there(self, layer: int) -> Held | None:
        """The blocks of a layer, if it has any yet."""
        return self.layers.get(self.same.get(layer, layer))

    def write(self, layer: int, keys: Tensor, values: Tensor, laid: Laid) -> None:
        """Stores the new keys (KV, T, D) and values (KV, T, Dv) of a step."""
        held = self.held(layer, keys, values)
        block, at = laid.place("new", keys.device)
        rows = [new.detach().transpose(0, 1)[: len(block)] for new in (keys, values)]
        if not laid.full:  # a GPU would wait for the host here
            taken = block >= 0  # -1 lies in block -1
            block, at, rows = block[taken], at[taken], [row[taken] for row in rows]
        for which, scales in enumerate((held.key_scales, held.value_scales)):
            if scales is not None:
                rows[which], scales[block, :, at] = quantised(rows[which])
        held.keys[block, :, :, at] = rows[0].to(held.keys.dtype)
        held.values[block, :, at, : held.size] = rows[1].to(held.values.dtype)

    def read(self, layer: int, laid: Laid, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the sequence of a span, (KV, past + L, D) and (KV, past + L, Dv), as `like`'s type."""
        start, end, past = laid.runs[index][:3]
        held, length = self.layers[self.same.get(layer, layer)], past + end - start
        first = laid.firsts[index]
        used = laid.on(like.device)[1][first : first + -(-length // self.size)]
        keys = _dense(held.keys[used].transpose(2, 3), held.key_scales, used, like.dtype)
        values = _dense(held.values[used], held.value_scales, used, like.dtype)
        flat = [x[:, :, : self.size].transpose(0, 1).flatten(1, 2)[:, :length] for x in (keys, values)]
        return flat[0], flat[1][..., : held.size]

    def read_single(self, layer: int, laid: Laid, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a step of single tokens the keys and values of all sequences, (S, KV, M, D) and (S, KV, M, Dv), and which
        of them are theirs, (S, M); what is not is 0."""
        held = self.layers[self.same.get(layer, layer)]
        table, lengths = laid.grid(like.device)
        keys = _dense(held.keys[table].transpose(3, 4), held.key_scales, table, like.dtype)
        values = _dense(held.values[table], held.value_scales, table, like.dtype)
        flat = [x[:, :, :, : self.size].transpose(1, 2).flatten(2, 3) for x in (keys, values)]
        there = torch.arange(flat[0].shape[2], device=like.device) < lengths[:, None]
        flat = [x.masked_fill(~there[:, None, :, None], 0) for x in flat]
        return flat[0], flat[1][..., : held.size], there

    def read_flat(self, layer: int, laid: Laid, like: Tensor) -> tuple[Tensor, Tensor]:
        """All keys (K, KV, D) and values (K, KV, Dv) of the sequences of all spans end to end, as `like`'s type."""
        held = self.layers[self.same.get(layer, layer)]
        block, at = laid.place("flat", like.device)
        used = block, slice(None), at
        keys = _dense(held.keys[block, :, :, at], held.key_scales, used, like.dtype)
        values = _dense(held.values[used], held.value_scales, used, like.dtype)
        return keys, values[..., : held.size]

    def copy(self, source: int, target: int) -> None:
        """Copies all that a block holds into another."""
        for held in self.layers.values():
            for tensor in held.tensors:
                tensor[target] = tensor[source]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies keys and values from slots (block * size + place in it) to slots, all of them at once: so the path of
        a tree of drafts that was accepted comes to lie end to end."""
        slots, known = torch.tensor([sources, targets]), dict[tuple[Any, ...], tuple[Tensor, Tensor]]()
        for held in self.layers.values():
            for at, tensor in enumerate(held.tensors):
                lanes = 2 if at else 3  # of keys, which lie turned, the last
                key = tensor.device, tensor.shape, lanes
                if key not in known:
                    known[key] = self._rows(slots, tensor, lanes)
                source, target = known[key]
                flat = tensor.view(-1, math.prod(tensor.shape[lanes + 1 :]))
                flat.index_copy_(0, target, flat.index_select(0, source))

    def _rows(self, slots: Tensor, tensor: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
        """Of slots (2, N) the rows of a tensor of blocks, if it is cut after its dimension of lanes."""
        apart = math.prod(tensor.shape[1:lanes])
        block, at = (slots // self.size)[:, :, None], (slots % self.size)[:, :, None]
        made = (block * apart + torch.arange(apart)) * tensor.shape[lanes] + at
        source, target = made.flatten(1).to(tensor.device)
        return source, target

    def _meet(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """A layer's first keys: those of another layer, or blocks of its own."""
        if self.came is None:
            raise ValueError(f"layer {layer} had no keys when the cache was sized")
        for other, came in self.came.items():
            if all(_same(a, b) for a, b in zip(came, (keys, values), strict=True)):
                self.same[layer] = other
                return
        self.came[layer] = keys, values
        shape = keys.shape[0], keys.shape[2], values.shape[2]
        self.layers[layer] = Held.made(self.blocks, self.size, shape, self.dtype or keys.dtype, keys.device)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) -> whole numbers up to 127 as int8, and the factor (...) in fp32 of each row; what is not finite gives a
    factor that is no number."""
    wide = x.float()
    factor = wide.abs().amax(-1) / 127
    whole = (wide / factor[..., None]).round().clamp(-127, 127).nan_to_num(0.0)
    return whole.to(torch.int8), torch.where(factor.isfinite(), factor, torch.nan)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.device == b.device


def _dense(there: Tensor, scales: Tensor | None, used: Any, dtype: torch.dtype) -> Tensor:
    """What is there (..., D) as numbers of a type; `used`: where their scales are."""
    return there.to(dtype) if scales is None else (there * scales[used][..., None]).to(dtype)
