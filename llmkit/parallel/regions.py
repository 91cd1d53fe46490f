"""The borders of a region that several ranks compute together, each with its part of the weights.

What comes in is whole on every rank, and each rank knows a part of its gradient: the backward pass sums them. What goes
out of the last product of the region is a part on every rank: the forward pass sums them (Megatron-LM's f and g,
arXiv:1909.08053).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkit.core.remake import carried


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def enter(module: nn.Module, group: Any) -> Any:
    """From now on the inputs of `module` enter a region: every tensor with a gradient among its arguments.
    Gives the hook."""

    def inward(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        return carried(value, cast(Tensor, cast(Any, _Enter).apply(value, group)))

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(map(inward, args)), {key: inward(value) for key, value in kwargs.items()}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def leave(module: nn.Module, group: Any) -> Any:
    """From now on the output of `module`, a tensor, is the sum of those of all ranks. Gives the hook."""
    return module.register_forward_hook(lambda _, __, out: cast(Any, _Leave).apply(out, group))
