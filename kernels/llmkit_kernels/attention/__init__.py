"""Causal attention inside of segments and over their ancestors, without a mask and with grouped key-value heads.

The algorithm is FlashAttention-2's (arXiv 2307.08691): scores exist for one block of queries and keys at a time, and
the backward pass makes them again from the log of each softmax's mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit_kernels.build import lacks, library

LANES = 16
KEYS = 64
"""Keys that are turned together; as in cpu.cpp."""
Segments = Sequence[tuple[int, int]]


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled row is of use to these: at most fp32, on a CPU, and heads of whole vectors."""
    whole = q.shape[-1] % LANES == 0 and v.shape[-1] % LANES == 0
    plain = all(x.device.type == "cpu" and x.dtype.itemsize <= 4 for x in (q, k, v))
    return whole and plain and not lacks("attention")


def causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    window: int = 0,
    parents: Sequence[int] = (),
) -> Tensor:
    """q (H, T, D), k (KV, T, D), v (KV, T, Dv) -> (T, H, Dv); query head h reads key-value head h // (H / KV).

    A query of segment [start, end) sees the keys from `start` up to itself, and before them those of the segment's
    ancestors: `parents` names an earlier segment for each, or -1; without any all are roots. With a window it sees the
    last `window` of them. Tokens of no segment give zeros.

    Raises:
        ValueError: the shapes do not go together, a segment is empty, overlaps another or leaves the row, or a parent
            is no earlier segment.
    """
    heads, tokens, size = q.shape
    if not q.dtype == k.dtype == v.dtype == torch.float32:
        raise ValueError(f"{q.dtype}, {k.dtype} and {v.dtype} are not fp32")
    if k.shape != (k.shape[0], tokens, size) or v.shape[:2] != k.shape[:2] or heads % k.shape[0]:
        raise ValueError(f"queries {tuple(q.shape)} do not go with keys {tuple(k.shape)} and values {tuple(v.shape)}")
    laid = laid_out(tuple(segments), tokens, tuple(parents))
    return cast(Tensor, cast(Any, _Causal).apply(q, k, v, laid, scale, window))


class Laid(NamedTuple):
    """What the kernel is told of the segments."""

    table: Tensor
    """(segments, 5): first token, the one after the last, the parent's row, how many tokens the ancestors have, and
    where the turned keys lie among those of the tree; trees one after the other."""
    trees: Tensor
    """Of each the row after its last."""
    longest: int
    """The most turned keys of a tree."""
    full: bool
    """Whether all tokens of the row are in a segment."""


@lru_cache(16)
def laid_out(segments: tuple[tuple[int, int], ...], tokens: int, parents: tuple[int, ...] = ()) -> Laid:
    """The segments, if they lie apart in [0, tokens): what does not would be read and written as other memory."""
    end = 0
    for start, stop in sorted(segments):
        if not end <= start < stop <= tokens:
            what = f"segment [{start}, {stop}) is empty, overlaps another or leaves the row of {tokens} tokens"
            raise ValueError(what)
        end = stop
    parents = parents or (-1,) * len(segments)
    roots = list[int]()
    for index, (_, parent) in enumerate(zip(segments, parents, strict=True)):
        if not -1 <= parent < index:
            raise ValueError(f"segment {index} has parent {parent}, which is no earlier segment")
        roots.append(index if parent < 0 else roots[parent])
    rows, trees, longest, turned = list[list[int]](), list[int](), 0, 0
    places = dict[int, int]()
    for index in sorted(range(len(segments)), key=roots.__getitem__):  # stable: parents stay before their children
        (start, stop), parent = segments[index], places.get(parents[index], -1)
        if parent < 0:
            trees, turned = [*trees, len(rows)], 0
        before = 0 if parent < 0 else rows[parent][3] + rows[parent][1] - rows[parent][0]
        places[index] = len(rows)
        rows.append([start, stop, parent, before, turned])
        turned += -(-(stop - start) // KEYS) * KEYS
        longest = max(longest, turned)
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
    full = sum(stop - start for start, stop in segments) == tokens
    return Laid(table, torch.tensor([*trees[1:], len(rows)], dtype=torch.int64)[: len(trees)], longest, full)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, laid: Laid, scale: float, window: int) -> Tensor:
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        heads, tokens, size = q.shape
        out = (torch.empty if laid.full else torch.zeros)(tokens, heads, v.shape[2], dtype=torch.float32, device="cpu")
        lse = torch.empty(heads, tokens, dtype=torch.float32, device="cpu")
        groups = heads // k.shape[0]
        shape = (laid.longest, len(laid.trees), tokens, heads, groups, size, v.shape[2], window, scale)
        steps = torch.tensor([x.stride(i) for x in (q, k, v) for i in (0, 1)])
        _call(0, (q, k, v, out, steps, lse, laid.table, laid.trees, _rooms(*shape)), shape)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.laid, ctx.shape, ctx.steps = laid, shape, steps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        heads, tokens, size = q.shape
        # the kernel writes to all tokens of segments, and to no other
        made = partial(torch.empty if ctx.laid.full else torch.zeros, dtype=torch.float32, device="cpu")
        to_q = made(tokens, heads, size)
        to_k, to_v = (torch.empty_like(x.transpose(0, 1), memory_format=torch.contiguous_format) for x in (k, v))
        sums = made(heads, tokens, size), made(heads, tokens, v.shape[2])
        given = (q, k, v, out, ctx.steps, lse, grad.contiguous(), to_q, to_k, to_v, *sums, ctx.laid.table)
        _call(1, (*given, ctx.laid.trees, _rooms(*ctx.shape)), ctx.shape)
        return to_q.transpose(0, 1), to_k.transpose(0, 1), to_v.transpose(0, 1), None, None, None


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
    for call, pointers in zip(calls, (9, 15), strict=True):
        call.argtypes, call.restype = [c_void_p] * pointers + [c_int64] * 8 + [c_float, c_int], None
    made.attention_room.argtypes, made.attention_room.restype = [c_int64] * 3, c_int64
    return (*calls, made.attention_room)
