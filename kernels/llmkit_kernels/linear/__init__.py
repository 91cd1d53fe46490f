"""Linears whose sums have one order: a row gives the same to the bit whatever is computed beside it."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_float, c_int, c_int64, c_void_p
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkit_kernels.build import lacks, library

RANK = 128
"""Of the largest LoRA that is added in here: its sum is one chain."""


class Low(NamedTuple):
    """What a LoRA adds to a linear: scale (x down') up', of down (rank, in) and up (out, rank)."""

    down: Tensor
    up: Tensor
    scale: float


class _Low(Structure):
    _fields_ = (("down", c_void_p), ("up", c_void_p), ("rank", c_int64), ("scale", c_float))


# All of these are on the way of each linear of each step, where what Python does is a good part of a narrow product:
# attributes of tensors alone are asked for, and nothing twice.


def suits(x: Tensor, *weights: Tensor) -> bool:
    """Whether the compiled row takes these: plain fp32 tensors on a CPU, the rows of a weight end to end."""
    for weight in weights:
        kind = type(weight)
        plain = (kind is torch.nn.Parameter or kind is Tensor) and weight.is_contiguous()
        if not plain or not _held(weight):
            return False
    return _held(x) and not lacks("linear")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in), weight (out, in), bias (out) -> x weight' + bias (N, out); it makes no gradient.

    Raises:
        ValueError: the shapes do not go together, something is not fp32 on a CPU, or a gradient is asked for.
    """
    return many(x, (weight,), (bias,))


def many(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lows: Sequence[Low | None] = ()
) -> Tensor:
    """What `linear` makes of x (N, in) with each of several weights, side by side: (N, all outs). `lows`: of each what
    a LoRA adds.

    Raises:
        ValueError: as `linear` does, or a rank is larger than `RANK`.
    """
    x, held, outs = _checked(x, weights, biases)
    rows, width, count = x.shape[0], sum(outs), len(outs)
    y, room = _empty(rows, width), _room(rows, x.shape[1])
    low, low_room = _lows(x, outs, lows)
    firsts, pointers = _pointers(held, count), c_int64 * count
    _calls()[0](
        *(x.data_ptr(), *firsts, pointers(*outs), count, y.data_ptr(), None if room is None else room.data_ptr()),
        *(low, None if low_room is None else low_room.data_ptr()),
        *(rows, x.shape[1], width, x.stride(0), torch.get_num_threads()),
    )
    return y


def gated(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    lows: Sequence[Low | None] = (),
) -> Tensor:
    """silu(linear(x, gate)) * linear(x, up), (N, out), to the bit as `silu_mul` makes it; `lows` as in `many`.

    Raises:
        ValueError: as `many` does, or the two are of different shapes.
    """
    x, held, outs = _checked(x, (gate, up), (gate_bias, up_bias))
    if outs[0] != outs[1]:
        raise ValueError(f"a gate of {outs[0]} does not go with {outs[1]}")
    rows, width = x.shape[0], outs[0]
    y, other, room = _empty(rows, width), _empty(rows, width), _room(rows, x.shape[1])
    low, low_room = _lows(x, outs, lows)
    given = (x, held[0], held[2], held[1], held[3], y, other, room)
    addresses = (None if one is None else one.data_ptr() for one in given)
    _calls()[1](
        *(*addresses, low, None if low_room is None else low_room.data_ptr()),
        *(rows, x.shape[1], width, x.stride(0), torch.get_num_threads()),
    )
    return y


def _lows(x: Tensor, outs: Sequence[int], lows: Sequence[Low | None]) -> tuple[Any, Tensor | None]:
    """LoRAs as C has them, and the room that they are worked in: nothing, where there are none."""
    if not any(lows):
        return None, None
    given, width = list[_Low](), 0
    for out, low in zip(outs, lows, strict=True):
        if low is None:
            given.append(_Low(None, None, 0, 0.0))
            continue
        down, up, scale = low
        rank = down.shape[0]
        if rank > RANK:
            raise ValueError(f"a LoRA of rank {rank} is none of {RANK} at most: add it by torch")
        if down.shape != (rank, x.shape[1]) or up.shape != (out, rank):
            raise ValueError(f"a LoRA {tuple(down.shape)}, {tuple(up.shape)} does not go with {out} outputs")
        if not (_held(down) and _held(up) and down.is_contiguous() and up.is_contiguous()):
            raise ValueError("a LoRA is not fp32 on a CPU, its rows end to end")
        if torch.is_grad_enabled() and (down.requires_grad or up.requires_grad):
            raise ValueError("no gradient is made here: call it under torch.no_grad()")
        given.append(_Low(down.data_ptr(), up.data_ptr(), rank, scale))
        width += rank
    return (_Low * len(given))(*given), _empty(width, x.shape[0] + _lanes(x.shape[0]))


def _checked(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor | None], list[int]]:
    """x, then weights and biases, as they are read; and how many outputs each has."""
    outs: list[int] = []
    for weight, bias in zip(weights, biases, strict=True):
        out, ins = weight.shape
        if x.dim() != 2 or x.shape[1] != ins or (bias is not None and bias.shape != (out,)):
            raise ValueError(f"rows {tuple(x.shape)} do not go with a weight {tuple(weight.shape)}")
        if not (_held(x) and _held(weight) and (bias is None or _held(bias))):
            raise ValueError("something is not fp32 on a CPU")
        outs.append(out)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights, *biases)):
        raise ValueError("no gradient is made here: call it under torch.no_grad()")
    held = [None if one is None else one.contiguous() for one in (*weights, *biases)]
    return x if x.stride(1) == 1 else x.contiguous(), held, outs


def _room(rows: int, ins: int) -> Tensor | None:
    """What few rows are laid across, if these are."""
    lanes = _lanes(rows)
    return _empty(ins, lanes) if lanes else None


def _empty(*shape: int) -> Tensor:
    """What C fills, whatever torch makes where nothing is said."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


@lru_cache(256)
def _lanes(rows: int) -> int:
    return int(_calls()[2](rows))


def _pointers(held: Sequence[Tensor | None], count: int) -> tuple[Any, Any]:
    kind = c_void_p * count
    made = [None if one is None else one.data_ptr() for one in held]
    return kind(*made[:count]), kind(*made[count:])


def _held(x: Tensor) -> bool:
    return x.is_cpu and x.dtype is torch.float32


@cache
def _calls() -> tuple[Any, Any, Any]:
    made = library("linear")
    forward, gate, room = made.linear_forward, made.linear_gated, made.linear_room
    forward.argtypes = [*[c_void_p] * 4, c_int64, *[c_void_p] * 4, *[c_int64] * 4, c_int]
    gate.argtypes = [*[c_void_p] * 10, *[c_int64] * 4, c_int]
    room.argtypes = [c_int64]
    forward.restype = gate.restype = None
    room.restype = c_int64
    return forward, gate, room
