"""Linears whose sums have one order: a row gives the same to the bit whatever is computed beside it."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmkit_kernels.build import lacks, library


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled row takes these: plain fp32 tensors on a CPU, the weight's rows end to end."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.is_contiguous()
    fp32 = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, weight))
    return plain and fp32 and not lacks("linear")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in), weight (out, in), bias (out) -> x weight' + bias (N, out); it makes no gradient.

    Raises:
        ValueError: the shapes do not go together, something is not fp32 on a CPU, or a gradient is asked for.
    """
    held = [x, weight] if bias is None else [x, weight, bias]
    if x.dim() != 2 or weight.shape != (weight.shape[0], x.shape[1]) or (bias is not None and len(bias) != len(weight)):
        raise ValueError(f"rows {tuple(x.shape)} do not go with a weight {tuple(weight.shape)}")
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in held):
        raise ValueError("something is not fp32 on a CPU")
    if torch.is_grad_enabled() and any(t.requires_grad for t in held):
        raise ValueError("no gradient is made here: call it under torch.no_grad()")
    x, weight = x if x.stride(1) == 1 else x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty(len(x), len(weight))
    given = (x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr())
    _call()(*given, len(x), x.shape[1], len(weight), x.stride(0), torch.get_num_threads())
    return out


@cache
def _call() -> Any:
    call = library("linear").linear_forward
    call.argtypes, call.restype = [c_void_p] * 4 + [c_int64] * 4 + [c_int], None
    return call
