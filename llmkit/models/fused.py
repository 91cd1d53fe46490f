"""Fast twins of common submodules, put in their place on an instance that we loaded.

A twin keeps the parameters, their names and the state of the module that it replaces, and does the same sums: linears
through `core.matmul`, gated MLPs without keeping the product that their backward can make again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from llmkit.core.matmul import linear, through


def fuse(model: nn.Module) -> dict[str, int]:
    """Replaces submodules of `model` in place; tells how many of each kind."""
    counts = {"linear": 0, "mlp": 0}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not _head(model):
                setattr(parent, name, _recast(child, FusedLinear))
                counts["linear"] += 1
            elif _gated(child):
                setattr(parent, name, _recast(child, FusedMlp))
                counts["mlp"] += 1
    return counts


def _head(model: nn.Module) -> nn.Module | None:
    return cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _recast(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    made = kind.__new__(kind)
    made.__dict__ = module.__dict__  # the same parameters, hooks and settings under another class
    return made


class FusedLinear(nn.Linear):
    """`nn.Linear` through `core.matmul`, with no gradient made that nobody asked for."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if torch.is_autocast_enabled(x.device.type) or x.dtype != self.weight.dtype:
            return super().forward(x)
        return cast(Tensor, cast(Any, _Linear).apply(x, self.weight, self.bias))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.shape, ctx.biased = x.shape, bias is not None
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        return linear(rows, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        out = grad.reshape(-1, grad.shape[-1])
        to_x = through(out, weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        to_weight = out.T @ rows if ctx.needs_input_grad[1] else None
        return to_x, to_weight, out.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None


def _gated(module: nn.Module) -> bool:
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
        return cast(Tensor, self.down_proj(cast(Any, _SiluMul).apply(self.gate_proj(x), self.up_proj(x))))


class _SiluMul(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        slope = torch.sigmoid(gate)
        silu = gate * slope
        to_up = grad * silu
        # d silu / d gate = sigmoid + silu (1 - sigmoid)
        slope.add_(silu.addcmul_(silu, slope, value=-1))
        return slope.mul_(up).mul_(grad), to_up
