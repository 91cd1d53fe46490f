"""Linears with their shapes checked and their addresses known, so that a call is given rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_float, c_int, c_int64, c_void_p
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkit_kernels.build import library
from llmkit_kernels.plain import flat, fp32

RANK = 128
"""Of the largest LoRA that is added in here: its sum is one chain."""
FLOAT = 4
"""Bytes."""


class Low(NamedTuple):
    """What a LoRA adds to a linear: scale (x down') up', of down (rank, in) and up (out, rank)."""

    down: Tensor
    up: Tensor
    scale: float


class _Low(Structure):
    _fields_ = (("down", c_void_p), ("up", c_void_p), ("rank", c_int64), ("scale", c_float))


class Ready:
    """Linears of one input; good as long as each tensor lies where it did (`place`)."""

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lows: Sequence[Low | None] = ()
    ) -> None:
        """Of each its weight (out, in), its bias (out), and what a LoRA adds.

        Raises:
            ValueError: the shapes do not go together, something is not fp32 on a CPU, or a rank is larger than `RANK`.
        """
        self.ins, count = weights[0].shape[1], len(weights)
        self.outs = [_checked(self.ins, *one) for one in zip(weights, biases, strict=True)]
        given = _lows(self.ins, self.outs, lows) if any(lows) else (None, 0)
        self.lows: Any = given[0]
        self.ranks = given[1]
        held = [None if one is None else one.contiguous() for one in (*weights, *biases)]
        more = [tensor for low in lows if low is not None for tensor in low[:2]]
        self.held = [*held, *more]
        """So that none goes away."""
        self.graded = any(tensor is not None and tensor.requires_grad for tensor in (*weights, *biases, *more))
        self.at = [None if one is None else one.data_ptr() for one in held]
        pointers, whole = c_void_p * count, c_int64 * count
        self.given = pointers(*self.at[:count]), pointers(*self.at[count:]), whole(*self.outs), count
        self.width = sum(self.outs)

    def many(self, x: Tensor) -> Tensor:
        """x (N, in) -> (N, all outs), side by side.

        Raises:
            ValueError: x does not go with them, or a gradient is asked for.
        """
        x, room = self._taken(x)
        rows, at = x.shape[0], room.data_ptr()
        y = _empty(rows, self.width)
        _calls()[0](
            *(x.data_ptr(), *self.given, y.data_ptr(), at, self.lows, at + self._across(rows) * FLOAT),
            *(rows, self.ins, self.width, x.stride(0), torch.get_num_threads()),
        )
        return y

    def gated(self, x: Tensor) -> Tensor:
        """Of two, x (N, in) -> silu(first) * second, (N, out).

        Raises:
            ValueError: as `many` does, or the two are of different shapes.
        """
        width, other = self.outs
        if width != other:
            raise ValueError(f"a gate of {width} does not go with {other}")
        x, room = self._taken(x)
        rows, at, (gate, up, gate_bias, up_bias) = x.shape[0], room.data_ptr(), self.at
        y, worked = _empty(rows, width), _empty(rows, width)
        _calls()[1](
            *(x.data_ptr(), gate, gate_bias, up, up_bias, y.data_ptr(), worked.data_ptr(), at),
            *(self.lows, at + self._across(rows) * FLOAT),
            *(rows, self.ins, width, x.stride(0), torch.get_num_threads()),
        )
        return y

    def room(self, rows: int) -> int:
        """Numbers that C works in with so many rows: what few of them are laid across, and what LoRAs make of them."""
        return self._across(rows) + self.ranks * (rows + _lanes(rows))

    def _across(self, rows: int) -> int:
        return self.ins * _lanes(rows)

    def _taken(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as they are read, and room."""
        if x.dim() != 2 or x.shape[1] != self.ins:
            raise ValueError(f"rows {tuple(x.shape)} do not go with weights of {self.ins} inputs")
        if not fp32(x):
            raise ValueError("something is not fp32 on a CPU")
        if torch.is_grad_enabled() and (self.graded or x.requires_grad):
            raise ValueError("no gradient is made here: call it under torch.no_grad()")
        return x if x.stride(1) == 1 else x.contiguous(), _empty(self.room(x.shape[0]))


def _checked(ins: int, weight: Tensor, bias: Tensor | None) -> int:
    """The outputs of a linear."""
    out, own = weight.shape
    if own != ins or (bias is not None and bias.shape != (out,)):
        raise ValueError(f"rows of {ins} do not go with a weight {tuple(weight.shape)}")
    if not (fp32(weight) and (bias is None or fp32(bias))):
        raise ValueError("something is not fp32 on a CPU")
    return out


def _lows(ins: int, outs: Sequence[int], lows: Sequence[Low | None]) -> tuple[Any, int]:
    """LoRAs as C has them, and all their ranks together."""
    given = list[_Low]()
    for out, low in zip(outs, lows, strict=True):
        if low is None:
            given.append(_Low(None, None, 0, 0.0))
            continue
        down, up, scale = low
        rank = down.shape[0]
        if rank > RANK:
            raise ValueError(f"a LoRA of rank {rank} is none of {RANK} at most: add it by torch")
        if down.shape != (rank, ins) or up.shape != (out, rank):
            raise ValueError(f"a LoRA {tuple(down.shape)}, {tuple(up.shape)} does not go with {out} outputs")
        if not (flat(down) and flat(up)):
            raise ValueError("a LoRA is not fp32 on a CPU, its rows end to end")
        given.append(_Low(down.data_ptr(), up.data_ptr(), rank, scale))
    return (_Low * len(given))(*given), sum(one.rank for one in given)


def _empty(*shape: int) -> Tensor:
    """What C fills, whatever torch makes where nothing is said."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


@lru_cache(256)
def _lanes(rows: int) -> int:
    return int(_calls()[2](rows))


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
