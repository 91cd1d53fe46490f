"""Linears whose sums have one order: a row gives the same to the bit whatever is computed beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkit_kernels.build import lacks
from llmkit_kernels.linear.ready import RANK as RANK
from llmkit_kernels.linear.ready import Low as Low
from llmkit_kernels.linear.ready import Ready as Ready
from llmkit_kernels.plain import flat, fp32

PLAIN = frozenset({Tensor, torch.nn.Parameter})
# All of these are on the way of each linear of each step, where what Python does is a good part of a narrow product:
# attributes of tensors alone are asked for, and nothing twice.


def suits(x: Tensor, *weights: Tensor) -> bool:
    """Whether the compiled row takes these: plain fp32 tensors on a CPU, the rows of a weight end to end."""
    return not any(place(weight) is None for weight in weights) and fp32(x) and not lacks("linear")


def place(tensor: Tensor) -> tuple[Any, ...] | None:
    """Where a tensor lies and how, to be compared; nothing of one that the compiled row does not read as it lies."""
    if type(tensor) in PLAIN and flat(tensor):
        return tensor.data_ptr(), tensor.shape, tensor.requires_grad
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in), weight (out, in), bias (out) -> x weight' + bias (N, out); it makes no gradient.

    Raises:
        ValueError: the shapes do not go together, something is not fp32 on a CPU, or a gradient is asked for.
    """
    return Ready((weight,), (bias,)).many(x)


def many(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lows: Sequence[Low | None] = ()
) -> Tensor:
    """What `linear` makes of x (N, in) with each of several weights, side by side: (N, all outs). `lows`: of each what
    a LoRA adds.

    Raises:
        ValueError: as `linear` does, or a rank is larger than `RANK`.
    """
    return Ready(weights, biases, lows).many(x)


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
    return Ready((gate, up), (gate_bias, up_bias), lows).gated(x)
