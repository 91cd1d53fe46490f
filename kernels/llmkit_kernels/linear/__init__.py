"""Linears whose sums have one order: a row gives the same to the bit whatever is computed beside it."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmkit_kernels.build import lacks, library

# Both are on the way of each linear of each step, where what Python does is a good part of a narrow product: attributes
# of tensors alone are asked for, and nothing twice.


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled row takes these: plain fp32 tensors on a CPU, the weight's rows end to end."""
    kind = type(weight)
    plain = (kind is torch.nn.Parameter or kind is Tensor) and weight.is_contiguous()
    return plain and _held(x) and _held(weight) and not lacks("linear")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in), weight (out, in), bias (out) -> x weight' + bias (N, out); it makes no gradient.

    Raises:
        ValueError: the shapes do not go together, something is not fp32 on a CPU, or a gradient is asked for.
    """
    shape, (outs, ins) = x.shape, weight.shape
    if len(shape) != 2 or shape[1] != ins or (bias is not None and bias.shape != (outs,)):
        raise ValueError(f"rows {tuple(shape)} do not go with a weight {tuple(weight.shape)}")
    if not (_held(x) and _held(weight) and (bias is None or _held(bias))):
        raise ValueError("something is not fp32 on a CPU")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        raise ValueError("no gradient is made here: call it under torch.no_grad()")
    x, weight = x if x.stride(1) == 1 else x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty(shape[0], outs)
    given = (x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr())
    _call()(*given, shape[0], ins, outs, x.stride(0), torch.get_num_threads())
    return out


def _held(x: Tensor) -> bool:
    return x.is_cpu and x.dtype is torch.float32


@cache
def _call() -> Any:
    call = library("linear").linear_forward
    call.argtypes, call.restype = [c_void_p] * 4 + [c_int64] * 4 + [c_int], None
    return call
