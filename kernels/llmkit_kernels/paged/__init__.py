"""Attention of ragged spans over keys and values in blocks: the compiled row, and how blocks and spans are laid out.

Blocks after PagedAttention (arXiv 2309.06180). A query's result is the same to the bit whatever is computed beside it,
in how many pieces its sequence came, whether its keys were found or made, and on how many threads.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmkit_kernels.build import lacks, library
from llmkit_kernels.paged.laid import Held, Laid

LARGEST = 256
"""Tokens of a block: a chunk of keys, over which a softmax goes, holds whole ones."""
ROWS = 48
"""Queries of a task, over all heads that share a key-value head."""
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
    if turn and not (turns(held) and all(x.shape == (tokens, size) and _flat(x) for x in turn)):
        raise ValueError(
            f"queries {tuple(q.shape)} are not turned by {tuple(turn[0].shape)} in a cache of this precision"
        )
    whole = held.keys.dtype == torch.int8
    q = _rows(q.float())
    k, v = (_rows(x.to(torch.float32 if whole else held.keys.dtype)) for x in (k, v))
    out = (torch.empty if laid.full and len(laid.slots) == tokens else torch.zeros)(tokens, heads, v.shape[2])
    groups = heads // k.shape[0]
    queries = max(1, ROWS // groups)
    tasks, strides = laid.by(queries), (c_int64 * 6)(*(x.stride(i) for x in (q, k, v) for i in (0, 1)))
    sinks = None if sinks is None else sinks.float().contiguous()
    rooms = torch.empty(torch.get_num_threads(), _room(groups, size, v.shape[2], held.block, queries))
    scales = (held.key_scales, held.value_scales)
    step = (out, held.keys, held.values, *scales, laid.slots, laid.spans, laid.table, laid.seen, laid.depths)
    numbers = (len(laid.slots), len(tasks), heads, groups, size, v.shape[2], held.block, queries, window)
    precision = PRECISIONS.index(held.keys.dtype)
    addresses = [None if x is None else x.data_ptr() for x in (*step, tasks, sinks, *(turn or (None, None)), rooms)]
    heads_at = (q.data_ptr(), k.data_ptr(), v.data_ptr(), strides)
    _calls()[0](*heads_at, *addresses, *numbers, precision, scale, cap, torch.get_num_threads())
    return out


def turns(held: Held) -> bool:
    """Whether keys of a cache can be turned on their way into it: what is kept in 16 bits comes rounded."""
    return held.keys.dtype in (torch.float32, torch.int8)


def _flat(x: Tensor) -> bool:
    return x.is_cpu and x.dtype is torch.float32 and x.is_contiguous()


@cache
def _room(*sizes: int) -> int:
    """Numbers that a thread needs to work in."""
    return int(_calls()[1](*sizes))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


@cache
def _calls() -> tuple[Any, Any]:
    made = library("paged")
    run, room = made.paged_attention, made.paged_room
    run.argtypes, run.restype = [c_void_p] * 19 + [c_int64] * 10 + [c_float, c_float, c_int], None
    room.argtypes, room.restype = [c_int64] * 5, c_int64
    return run, room
