"""Causal attention inside of segments that lie end to end, without a mask and with grouped key-value heads.

The algorithm is FlashAttention-2's (arXiv 2307.08691): scores exist for one block of queries and keys at a time, and
the backward pass makes them again from the log of each softmax's mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache, lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit_kernels.build import lacks, library

LANES = 16
Segments = Sequence[tuple[int, int]]


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled row is of use to these: at most fp32, on a CPU, and heads of whole vectors."""
    whole = q.shape[-1] % LANES == 0 and v.shape[-1] % LANES == 0
    plain = all(x.device.type == "cpu" and x.dtype.itemsize <= 4 for x in (q, k, v))
    return whole and plain and not lacks("attention")


def causal(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int = 0) -> Tensor:
    """q (H, T, D), k (KV, T, D), v (KV, T, Dv) -> (T, H, Dv); query head h reads key-value head h // (H / KV).

    A query of segment [start, end) sees the keys from `start` (with a window, the last `window` of them) up to itself.
    Tokens of no segment give zeros.

    Raises:
        ValueError: the shapes do not go together, or a segment is empty, overlaps another or leaves the row.
    """
    heads, tokens, size = q.shape
    if not q.dtype == k.dtype == v.dtype == torch.float32:
        raise ValueError(f"{q.dtype}, {k.dtype} and {v.dtype} are not fp32")
    if k.shape != (k.shape[0], tokens, size) or v.shape[:2] != k.shape[:2] or heads % k.shape[0]:
        raise ValueError(f"queries {tuple(q.shape)} do not go with keys {tuple(k.shape)} and values {tuple(v.shape)}")
    return cast(Tensor, cast(Any, _Causal).apply(q, k, v, checked(tuple(segments), tokens), scale, window))


@lru_cache(16)
def checked(segments: tuple[tuple[int, int], ...], tokens: int) -> tuple[tuple[int, int], ...]:
    """The segments, if they lie apart in [0, tokens): what does not would be read and written as other memory."""
    end = 0
    for start, stop in sorted(segments):
        if not end <= start < stop <= tokens:
            what = f"segment [{start}, {stop}) is empty, overlaps another or leaves the row of {tokens} tokens"
            raise ValueError(what)
        end = stop
    return segments


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Any, scale: float, window: int) -> Tensor:
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        heads, tokens, size = q.shape
        ctx.full = sum(end - start for start, end in segments) == tokens
        out = (torch.empty if ctx.full else torch.zeros)(tokens, heads, v.shape[2], dtype=torch.float32, device="cpu")
        lse = torch.empty(heads, tokens, dtype=torch.float32, device="cpu")
        longest = max((end - start for start, end in segments), default=0)
        shape = (longest, len(segments), tokens, heads, heads // k.shape[0], size, v.shape[2], window, scale)
        table, steps = _table(segments), torch.tensor([x.stride(i) for x in (q, k, v) for i in (0, 1)])
        _call(0, (q, k, v, out, steps, lse, table, _rooms(*shape)), shape)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.table, ctx.shape, ctx.steps = table, shape, steps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        heads, tokens, size = q.shape
        # the kernel writes to all tokens of segments, and to no other
        made = partial(torch.empty if ctx.full else torch.zeros, dtype=torch.float32, device="cpu")
        to_q = made(tokens, heads, size)
        to_k, to_v = (torch.empty_like(x.transpose(0, 1), memory_format=torch.contiguous_format) for x in (k, v))
        sums = made(heads, tokens, size), made(heads, tokens, v.shape[2])
        given = (q, k, v, out, ctx.steps, lse, grad.contiguous(), to_q, to_k, to_v, *sums, ctx.table)
        _call(1, (*given, _rooms(*ctx.shape)), ctx.shape)
        return to_q.transpose(0, 1), to_k.transpose(0, 1), to_v.transpose(0, 1), None, None, None


@lru_cache(16)
def _table(segments: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.tensor(segments, dtype=torch.int64).reshape(-1, 2)


def _rooms(longest: int, *shape: Any) -> Tensor:
    """What the threads work in."""
    room = _calls()[2](longest, shape[4], shape[5])
    return torch.empty(torch.get_num_threads(), room, dtype=torch.float32, device="cpu")


def _call(which: int, tensors: tuple[Tensor, ...], shape: tuple[Any, ...]) -> None:
    """Hands over addresses; `tensors` keeps what lies there alive until the call is done."""
    _calls()[which](*(tensor.data_ptr() for tensor in tensors), *shape, torch.get_num_threads())


@cache
def _calls() -> tuple[Any, Any, Any]:
    made = library("attention")
    calls = made.attention_forward, made.attention_backward
    for call, pointers in zip(calls, (8, 14), strict=True):
        call.argtypes, call.restype = [c_void_p] * pointers + [c_int64] * 8 + [c_float, c_int], None
    made.attention_room.argtypes, made.attention_room.restype = [c_int64] * 3, c_int64
    return (*calls, made.attention_room)
