"""Causal attention inside of segments that lie end to end, without a mask and with grouped key-value heads.

The algorithm is FlashAttention-2's (arXiv 2307.08691): scores exist for one block of queries and keys at a time, and
the backward pass makes them again from the log of each softmax's mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache, lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit_kernels.build import lacks, library

LANES = 16
Segments = Sequence[tuple[int, int]]


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled row takes these: fp32 on a CPU, and heads of whole vectors."""
    whole = q.shape[-1] % LANES == 0 and v.shape[-1] % LANES == 0
    plain = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (q, k, v))
    return whole and plain and not lacks()


def causal(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int = 0) -> Tensor:
    """q (H, T, D), k (KV, T, D), v (KV, T, Dv) -> (T, H, Dv); query head h reads key-value head h // (H / KV).

    A query of segment [start, end) sees the keys from `start` (with a window, the last `window` of them) up to itself.
    Tokens of no segment give zeros. Segments do not overlap.
    """
    return cast(Tensor, cast(Any, _Causal).apply(q, k, v, tuple(segments), scale, window))


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Any, scale: float, window: int) -> Tensor:
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        heads, tokens, size = q.shape
        full = sum(end - start for start, end in segments) == tokens
        out = (torch.empty if full else torch.zeros)(tokens, heads, v.shape[2])
        lse = torch.empty(heads, tokens)
        table, more = _table(segments), (heads, heads // k.shape[0], size, v.shape[2], window, scale)
        steps = torch.tensor([x.stride(i) for x in (q, k, v) for i in (0, 1)])
        _calls()[0](*_at(q, k, v, out, steps, lse, table), len(segments), tokens, *more, torch.get_num_threads())
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.table, ctx.more, ctx.steps, ctx.full = table, more, steps, full
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        to_q = (torch.empty if ctx.full else torch.zeros)(q.shape[1], q.shape[0], q.shape[2])
        to_k, to_v = (torch.empty(x.shape[1], x.shape[0], x.shape[2]) for x in (k, v))
        given = _at(q, k, v, out, ctx.steps, lse, grad, to_q, to_k, to_v, ctx.table)
        _calls()[1](*given, len(ctx.table), q.shape[1], *ctx.more, torch.get_num_threads())
        return to_q.transpose(0, 1), to_k.transpose(0, 1), to_v.transpose(0, 1), None, None, None


@lru_cache(16)
def _table(segments: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.tensor(segments, dtype=torch.int64).reshape(-1, 2)


def _at(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@cache
def _calls() -> tuple[Any, Any]:
    made = library()
    calls = made.attention_forward, made.attention_backward
    for call, pointers in zip(calls, (7, 11), strict=True):
        call.argtypes, call.restype = [c_void_p] * pointers + [c_int64] * 7 + [c_float, c_int], None
    return calls
