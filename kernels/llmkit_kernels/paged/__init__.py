"""Attention of ragged spans over keys and values in blocks: the compiled row, and how blocks and spans are laid out.

Blocks after PagedAttention (arXiv 2309.06180). A query's result is the same to the bit whatever is computed beside it,
in how many pieces its sequence came, whether its keys were found or made, and on how many threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmkit_kernels.build import lacks, library
from llmkit_kernels.paged.laid import Held, Laid
from llmkit_kernels.plain import flat

LARGEST = 256
"""Tokens of a block: a chunk of keys, over which a softmax goes, holds whole ones."""
ROWS = 48
"""Queries of a task, over all heads that share a key-value head."""
Strides = c_int64 * 6
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def suits(q: Tensor, k: Tensor, v: Tensor, block: int) -> bool:
    """Whether the compiled row takes these: at most fp32, on a CPU."""
    plain = all(x.device.type == "cpu" and x.dtype.itemsize <= 4 for x in (q, k, v))
    return plain and block <= LARGEST and not lacks("paged")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Held,
    laid: Laid,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    turn: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Stores k (KV, T, D) and v (KV, T, Dv) of a step's tokens, then attends: q (H, T, D) -> (T, H, Dv) in fp32.

    A token sees what came before its span and what precedes it in that, or its ancestors in a tree; with a window the
    last `window` of them alone. `cap`: scores become cap * tanh(score / cap). `sinks` (H,): logits of a key that is
    nowhere. `turn`: cosines and sines (T, D) by which queries and keys are turned before all this, halves against each
    other (RoPE), where a cache `turns`. `laid` must have been made for the number of blocks that `held` has.

    Raises:
        ValueError: the shapes do not go together.
    """
    heads, tokens, size = q.shape
    if k.shape[1:] != (tokens, size) or v.shape[:2] != k.shape[:2] or heads % k.shape[0] or len(laid.slots) > tokens:
        raise ValueError(f"queries {tuple(q.shape)} do not go with keys {tuple(k.shape)} and values {tuple(v.shape)}")
    if held.keys.shape[1:3] != (k.shape[0], size) or held.size != v.shape[2]:
        raise ValueError(f"keys {tuple(k.shape)} do not go into blocks {tuple(held.keys.shape)}")
    if turn and not (turns(held) and all(x.shape == (tokens, size) and flat(x) for x in turn)):
        raise ValueError(
            f"queries {tuple(q.shape)} are not turned by {tuple(turn[0].shape)} in a cache of this precision"
        )
    kept = held.keys.dtype
    q, k, v = _rows(q, torch.float32), *(_rows(x, torch.float32 if kept == torch.int8 else kept) for x in (k, v))
    count, groups = laid.slots.shape[0], heads // k.shape[0]
    made = torch.empty if laid.full and count == tokens else torch.zeros
    out = made(tokens, heads, v.shape[2], dtype=torch.float32, device="cpu")
    share = queries(groups)
    strides = Strides(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    sinks = None if sinks is None else sinks.float().contiguous()
    room = _room(groups, size, v.shape[2], held.block, share)
    rooms = torch.empty(torch.get_num_threads(), room, dtype=torch.float32, device="cpu")
    new = (q.data_ptr(), k.data_ptr(), v.data_ptr(), strides, out.data_ptr())
    there = (held.keys, held.values, held.key_scales, held.value_scales)
    tasks, at = laid.addresses(share)
    numbers = (count, tasks, heads, groups, size, v.shape[2], held.block, share, window, PRECISIONS.index(kept))
    _calls()[0](
        *(*new, *_at(there), *at, *_at((sinks, *(turn or (None, None)), rooms))),
        *(*numbers, scale, cap, torch.get_num_threads()),
    )
    return out


def queries(groups: int) -> int:
    """Of a task, where so many heads share a key-value head."""
    return max(1, ROWS // groups)


def _at(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in tensors]


def turns(held: Held) -> bool:
    """Whether keys of a cache can be turned on their way into it: what is kept in 16 bits comes rounded."""
    return held.keys.dtype in (torch.float32, torch.int8)


@cache
def _room(*sizes: int) -> int:
    """Numbers that a thread needs to work in."""
    return int(_calls()[1](*sizes))


def _rows(x: Tensor, kind: torch.dtype) -> Tensor:
    x = x if x.dtype == kind else x.to(kind)
    return x if x.stride(2) == 1 else x.contiguous()


@cache
def _calls() -> tuple[Any, Any]:
    made = library("paged")
    run, room = made.paged_attention, made.paged_room
    run.argtypes, run.restype = [c_void_p] * 19 + [c_int64] * 10 + [c_float, c_float, c_int], None
    room.argtypes, room.restype = [c_int64] * 5, c_int64
    return run, room
