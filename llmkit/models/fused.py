"""Fast twins of common submodules, put in their place on an instance that we loaded.

A twin keeps the parameters, their names and the state of the module that it replaces, and does the same sums: linears
through `core.matmul`, gated MLPs without keeping the product that their backward can make again.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, cast

import torch
from llmkit_kernels import linear as few
from llmkit_kernels.gated import silu_mul
from llmkit_kernels.norm import reference, rms_norm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmkit.core.matmul import linear, through
from llmkit.core.recast import recast
from llmkit.core.remake import Way, remakable, way_to
from llmkit.models.alike import Once

FEW = 32
"""Rows up to which the linear that is made for few of them is the faster one: those of a step of the engine."""


def fuse(model: nn.Module) -> dict[str, int]:
    """Replaces submodules of `model` in place; tells how many of each kind."""
    counts, once = {"linear": 0, "mlp": 0, "norm": 0}, Once()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not _head(model):
                setattr(parent, name, recast(child, FusedLinear))
                counts["linear"] += 1
            elif once(gated, child):
                setattr(parent, name, recast(child, FusedMlp))
                counts["mlp"] += 1
            elif once(root_mean_square, child):
                setattr(parent, name, recast(child, FusedNorm))
                counts["norm"] += 1
    return counts


def _head(model: nn.Module) -> nn.Module | None:
    return cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


class FusedLinear(nn.Linear):
    """`nn.Linear` through `core.matmul`, with no gradient made that nobody asked for."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if torch.is_autocast_enabled(x.device.type) or x.dtype != self.weight.dtype:
            return super().forward(x)
        if x.numel() <= FEW * x.shape[-1] and not torch.is_grad_enabled() and few.suits(x, self.weight):
            made = few.linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
            return made.view(*x.shape[:-1], made.shape[-1])
        rows = cast(Any, _Linear).apply(x, self.weight, self.bias, way_to(x))
        return cast(Tensor, rows.view(*x.shape[:-1], rows.shape[-1]))


class _Linear(torch.autograd.Function):
    """x is of any shape, the result in rows: a view that was made in here could not be changed in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.shape, ctx.biased, ctx.make = x.shape, bias is not None, way.make
        ctx.save_for_backward(weight, *(way.sources if ctx.needs_input_grad[1] else ()))
        return linear(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        to_x = through(grad, weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        to_weight = grad.T @ ctx.make(*sources).reshape(-1, ctx.shape[-1]) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, grad.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None, None


def gated(module: nn.Module) -> bool:
    """Whether a module is `down(silu(gate(x)) * up(x))`: by its parts, and by trying it."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    silu = getattr(getattr(module, "act_fn", None), "__class__", type(None)).__name__ in ("SiLU", "SiLUActivation")
    if not silu or len(list(module.children())) != 4 or not all(isinstance(part, nn.Linear) for part in parts):
        return False
    gate, up, down = cast(list[nn.Linear], parts)
    if gate.weight.is_meta or gate.weight.shape != up.weight.shape or not gate.weight.is_floating_point():
        return False
    x = torch.linspace(-1, 1, gate.in_features, device=gate.weight.device, dtype=gate.weight.dtype)[None]
    with torch.no_grad():
        return torch.allclose(module(x), down(nn.functional.silu(gate(x)) * up(x)), rtol=1e-5, atol=1e-6)


class FusedMlp(nn.Module):
    """A gated MLP that keeps its gate and up projections for the backward pass and nothing else."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        return cast(Tensor, self.down_proj(remakable(silu_mul(gate, up), silu_mul, gate, up)))


def root_mean_square(module: nn.Module) -> bool:
    """Whether a module is `weight * x / rms(x)`: by its parts, and by trying it."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or weight.dim() != 1 or weight.is_meta:
        return False
    if len(inspect.signature(module.forward).parameters) != 1:  # a gate beside it, as those of state spaces have
        return False
    x = torch.linspace(-1, 2, weight.numel(), device=weight.device, dtype=weight.dtype)[None]
    with torch.no_grad():
        kind = torch.promote_types(x.dtype, torch.float32)
        wide = reference.rms_norm(x.to(kind), torch.ones_like(weight, dtype=kind), eps)
        return torch.allclose(module(x), weight * wide.to(x.dtype), rtol=1e-5, atol=1e-6)


class FusedNorm(nn.Module):
    """A root-mean-square norm in one pass each way; in 16 bits it computes in fp32, as transformers' own do."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        if x.dtype in (torch.float16, torch.bfloat16) and x.is_cuda:
            made = nn.functional.rms_norm(x, x.shape[-1:], None, self.variance_epsilon)  # one kernel, in fp32 inside
            return self.weight * made.to(x.dtype)
        if x.dtype in (torch.float16, torch.bfloat16):
            ones = torch.ones_like(self.weight, dtype=torch.float32)
            return self.weight * reference.rms_norm(x.float(), ones, self.variance_epsilon).to(x.dtype)
        made = rms_norm(x, self.weight, self.variance_epsilon)
        return remakable(made, partial(rms_norm, eps=self.variance_epsilon), x, self.weight)
