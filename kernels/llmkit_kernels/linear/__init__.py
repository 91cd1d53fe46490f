"""Linears whose sums have one order: a row gives the same to the bit whatever is computed beside it."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from llmkit_kernels.build import lacks, library

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


def many(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """What `linear` makes of x (N, in) with each of several weights, side by side: (N, all outs).

    Raises:
        ValueError: as `linear` does.
    """
    x, held, outs = _checked(x, weights, biases)
    rows, width, count = x.shape[0], sum(outs), len(outs)
    y, room = _empty(rows, width), _room(rows, x.shape[1])
    firsts, pointers = _pointers(held, count), c_int64 * count
    _calls()[0](
        *(x.data_ptr(), *firsts, pointers(*outs), count, y.data_ptr(), None if room is None else room.data_ptr()),
        *(rows, x.shape[1], width, x.stride(0), torch.get_num_threads()),
    )
    return y


def gated(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Tensor:
    """silu(linear(x, gate)) * linear(x, up), (N, out), to the bit as `silu_mul` makes it.

    Raises:
        ValueError: as `linear` does, or the two are of different shapes.
    """
    x, held, outs = _checked(x, (gate, up), (gate_bias, up_bias))
    if outs[0] != outs[1]:
        raise ValueError(f"a gate of {outs[0]} does not go with {outs[1]}")
    rows, width = x.shape[0], outs[0]
    y, other, room = _empty(rows, width), _empty(rows, width), _room(rows, x.shape[1])
    given = (x, held[0], held[2], held[1], held[3], y, other, room)
    addresses = (None if one is None else one.data_ptr() for one in given)
    _calls()[1](*addresses, rows, x.shape[1], width, x.stride(0), torch.get_num_threads())
    return y


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
    forward.argtypes = [*[c_void_p] * 4, c_int64, *[c_void_p] * 2, *[c_int64] * 4, c_int]
    gate.argtypes = [*[c_void_p] * 8, *[c_int64] * 4, c_int]
    room.argtypes = [c_int64]
    forward.restype = gate.restype = None
    room.restype = c_int64
    return forward, gate, room
