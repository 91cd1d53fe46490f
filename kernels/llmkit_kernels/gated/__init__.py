"""silu(gate) * up (SwiGLU, arXiv 2002.05202) in one pass each way, with nothing kept but its arguments."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmkit_kernels.build import lacks, library
from llmkit_kernels.plain import flat


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Two tensors of one shape -> silu(gate) * up.

    Raises:
        ValueError: their shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"a gate of shape {tuple(gate.shape)} does not go with {tuple(up.shape)}")
    if not torch.is_grad_enabled():
        return _product(gate, up)
    return cast(Tensor, cast(Any, _SiluMul).apply(gate, up))


def _product(gate: Tensor, up: Tensor) -> Tensor:
    if not _compiled(gate, up):
        return nn.functional.silu(gate).mul_(up)
    out = torch.empty_like(gate)
    _calls()[0](gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), torch.get_num_threads())
    return out


def _compiled(*tensors: Tensor) -> bool:
    return all(map(flat, tensors)) and not lacks("gated")


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if not _compiled(gate, up, grad):
            return _plain_gradients(gate, up, grad)
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        given = [x.data_ptr() for x in (gate, up, grad, to_gate, to_up)]
        _calls()[1](*given, gate.numel(), torch.get_num_threads())
        return to_gate, to_up


def _plain_gradients(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), nn.functional.silu(gate).mul_(grad)


@cache
def _calls() -> tuple[Any, Any]:
    made = library("gated")
    calls = made.gated_forward, made.gated_backward
    for call, pointers in zip(calls, (3, 5), strict=True):
        call.argtypes, call.restype = [c_void_p] * pointers + [c_int64, c_int], None
    return calls
