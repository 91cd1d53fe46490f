"""A whole layer in one call: norm, attention over cached keys, norm and gated MLP, to the bit as own calls make it."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, byref, c_float, c_int, c_int64, c_void_p, cast
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkit_kernels import build
from llmkit_kernels.linear.ready import Ready
from llmkit_kernels.paged import PRECISIONS, queries
from llmkit_kernels.paged.laid import Held, Laid
from llmkit_kernels.plain import flat

NEEDS = "layer", "linear", "norm", "paged"


class Rule(NamedTuple):
    """What attention does: queries' heads, those of keys and values, numbers of a head; the last `window` tokens alone
    are seen, if there is one; a score becomes cap * tanh(score / cap), if there is one."""

    heads: int
    held: int
    size: int
    window: int
    scale: float
    cap: float


class Norm(NamedTuple):
    """A root-mean-square norm."""

    weight: Tensor
    eps: float


def lacks() -> str:
    """Why there is no compiled layer here, or nothing."""
    return next(filter(None, map(build.lacks, NEEDS)), "")


class Layer:
    """A layer's linears and norms with their addresses: good as long as each tensor lies where it did."""

    def __init__(
        self, inner: Ready, out: Ready, both: Ready, down: Ready, norms: Sequence[Norm | None], rule: Rule
    ) -> None:
        """`inner`: of queries, keys and values; `both`: gate and up. `norms`: before attention, before the MLP, of
        queries, of keys.

        Raises:
            ValueError: the shapes do not go together.
        """
        heads, held, size, *_ = rule
        outs = [heads * size, held * size, held * size]
        width = inner.ins
        chain = (inner.outs, out.ins, out.outs, both.ins, both.outs, down.ins, down.outs)
        if heads % held or chain != (outs, heads * size, [width], width, [down.ins] * 2, down.ins, [width]):
            raise ValueError(f"linears {chain} are no layer of {rule}")
        sizes = (width, width, size, size)
        if any(one is not None and one.weight.shape != (n,) for one, n in zip(norms, sizes, strict=True)):
            raise ValueError(f"norms are not over {sizes}")
        self.kept = inner, out, both, down, norms
        self.rule, self.width = rule, width
        ready, over = map(_linears, (inner, out, both, down)), map(_norm, norms)
        self.given = byref(_Layer(*ready, *over, heads, held, size, rule.window, rule.scale, rule.cap))

    def run(self, x: Tensor, held: Held, laid: Laid, turn: tuple[Tensor, Tensor]) -> Tensor:
        """x (T, hidden) -> the same after the layer, whose keys and values go to their slots. `turn`: cosines and sines
        (T, D), as `paged.attend` takes them.

        Raises:
            ValueError: something does not go with the layer, or is not fp32 on a CPU, its rows end to end.
        """
        rows, (heads, kept, size, *_) = x.shape[0], self.rule
        if x.shape != (rows, self.width) or any(one.shape != (rows, size) for one in turn):
            raise ValueError(f"rows {tuple(x.shape)} turned by {tuple(turn[0].shape)} do not go with {self.rule}")
        if held.keys.shape[1:3] != (kept, size) or held.size != size or not laid.full or len(laid.slots) != rows:
            raise ValueError(f"rows {tuple(x.shape)} do not go into blocks {tuple(held.keys.shape)}")
        if not all(map(flat, (x, *turn))):
            raise ValueError("something is not fp32 on a CPU, its rows end to end")
        share, threads = queries(heads // kept), torch.get_num_threads()
        tasks, at = laid.addresses(share)
        there = (held.keys, held.values, held.key_scales, held.value_scales)
        blocks = [None if one is None else one.data_ptr() for one in there]
        angles = [one.data_ptr() for one in turn]
        numbers = (rows, tasks, held.block, share, PRECISIONS.index(held.keys.dtype))
        step, (calls, forward, room) = byref(_Step(*blocks, *at, *angles, *numbers)), _calls()
        y = torch.empty(rows, self.width, dtype=torch.float32, device="cpu")
        work = torch.empty(room(calls, self.given, step, threads), dtype=torch.float32, device="cpu")
        forward(calls, self.given, step, x.data_ptr(), y.data_ptr(), work.data_ptr(), threads)
        return y


class _Linears(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weights", "biases", "outs", "lows")),
        *((name, c_int64) for name in ("count", "ins", "width", "ranks")),
    )


class _Norm(Structure):
    _fields_ = (("weight", c_void_p), ("eps", c_float))


class _Layer(Structure):
    _fields_ = (
        *((name, _Linears) for name in ("inner", "out", "both", "down")),
        *((name, _Norm) for name in ("before", "after", "query", "key")),
        *((name, c_int64) for name in ("heads", "held", "size", "window")),
        ("scale", c_float),
        ("cap", c_float),
    )


class _Step(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "by_key", "by_value")),
        *((name, c_void_p) for name in ("slots", "spans", "table", "seen", "depths", "tasks", "cos", "sin")),
        *((name, c_int64) for name in ("rows", "count", "block", "queries", "precision")),
    )


def _linears(ready: Ready) -> _Linears:
    weights, biases, outs, count = ready.given
    lows = None if ready.lows is None else addressof(ready.lows)
    return _Linears(
        addressof(weights), addressof(biases), addressof(outs), lows, count, ready.ins, ready.width, ready.ranks
    )


def _norm(norm: Norm | None) -> _Norm:
    return _Norm(None, 0.0) if norm is None else _Norm(norm.weight.data_ptr(), norm.eps)


@cache
def _calls() -> tuple[Any, Any, Any]:
    """Where the functions of the other libraries lie, and the two of this one."""
    names = "linear_forward", "linear_gated", "linear_room", "norm_forward", "paged_attention", "paged_room"
    found = [cast(getattr(build.library(name.split("_")[0]), name), c_void_p).value for name in names]
    made = build.library("layer")
    made.layer_room.argtypes, made.layer_room.restype = [c_void_p] * 3 + [c_int], c_int64
    made.layer_forward.argtypes, made.layer_forward.restype = [c_void_p] * 6 + [c_int], None
    return (c_void_p * len(names))(*found), made.layer_forward, made.layer_room
