"""Root-mean-square norm (arXiv 1910.07467) in one pass each way."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit_kernels.build import lacks, library
from llmkit_kernels.norm import reference

LANES = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., size), weight (size) -> weight * x / sqrt(mean(x^2) + eps), (..., size).

    Raises:
        ValueError: the weight is of another size.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} does not go with rows of {x.shape[-1]}")
    if x.device.type == "cuda" and x.dtype == weight.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)  # one kernel each way; x is kept, no copy
    graded = torch.is_grad_enabled()
    whole = x.shape[-1] % LANES == 0 or not graded  # only the backward pass wants whole vectors
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and whole
    if not fits or not x.numel() or lacks("norm"):
        return reference.rms_norm(x, weight, eps)
    if not graded:
        return _normed(x.contiguous(), weight.contiguous(), eps, None)
    return cast(Tensor, cast(Any, _RmsNorm).apply(x.contiguous(), weight.contiguous(), eps))


def _normed(x: Tensor, weight: Tensor, eps: float, over: Tensor | None) -> Tensor:
    out, size = torch.empty_like(x), x.shape[-1]
    given = (x.data_ptr(), weight.data_ptr(), out.data_ptr(), None if over is None else over.data_ptr())
    _calls()[0](*given, x.numel() // size, size, eps, torch.get_num_threads())
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        over = torch.empty(x.numel() // x.shape[-1], dtype=torch.float32, device="cpu")
        out = _normed(x, weight, eps, over)
        ctx.save_for_backward(x, weight, over)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, over = ctx.saved_tensors
        grad, threads = grad.contiguous(), torch.get_num_threads()
        to_x = torch.empty_like(x)
        shape, asked = (threads, x.shape[-1]), ctx.needs_input_grad[1]
        to_weight = torch.zeros(shape, dtype=torch.float32, device="cpu") if asked else None
        given = [t.data_ptr() for t in (x, weight, over, grad, to_x)]
        sums = None if to_weight is None else to_weight.data_ptr()
        _calls()[1](*given, sums, len(over), x.shape[-1], threads)
        return to_x, None if to_weight is None else to_weight.sum(0), None


@cache
def _calls() -> tuple[Any, Any]:
    made = library("norm")
    calls = made.norm_forward, made.norm_backward
    calls[0].argtypes = [c_void_p] * 4 + [c_int64] * 2 + [c_float, c_int]
    calls[1].argtypes = [c_void_p] * 6 + [c_int64] * 2 + [c_int]
    for call in calls:
        call.restype = None
    return calls
