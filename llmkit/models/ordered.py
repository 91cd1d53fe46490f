"""Operations that give a row the same to the bit whatever is computed beside it, and whatever computes beside us.

Products go through the compiled linear, or through torch's in calls of one size: the order of a BLAS's sums depends on
the number of rows. Functions of single elements go over whole vectors: what torch computes at the end of a tensor, or
where its threads meet, is rounded differently from what it computes in vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llmkit_kernels import linear
from llmkit_kernels.build import lacks
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

ROWS = 16
"""Rows of a call of torch's linear, where the compiled one is not there."""
VECTOR = 64
"""Elements of whole vectors, however torch unrolls them."""
GRAIN = 32768
"""Elements from which on torch gives a share to another thread."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out) -> (..., out); it makes no gradient where the compiled row does it."""
    rows = x.reshape(-1, x.shape[-1])
    made = linear.linear(rows, weight, bias) if linear.suits(rows, weight) else _blocks(rows, weight, bias)
    return made.view(*x.shape[:-1], made.shape[1])


def _blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    whole = pad(x, (0, 0, 0, -len(x) % ROWS))
    parts = [torch.nn.functional.linear(part, weight, bias) for part in whole.split(ROWS)]
    return torch.cat(parts)[: len(x)] if parts else x.new_empty(0, len(weight))


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function`, of each element by itself, over whole vectors."""
    if x.device.type != "cpu":
        return function(x)
    count = x.numel()
    shares = max(1, min(torch.get_num_threads(), -(-count // GRAIN)))
    flat, more = x.reshape(-1), -count % (VECTOR * shares)
    made = function(pad(flat, (0, more)) if more else flat)
    return (made[:count] if more else made).view(x.shape)


class Ordered(TorchFunctionMode):
    """Inside, what modules compute by functions instead of submodules has one order too: routers, experts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Puts ours in the place of linears, products with a matrix, and functions of elements."""
        kwargs = kwargs or {}
        if func in LINEAR:
            return product(*args, **kwargs)
        if func in MATMUL and not kwargs and args[1].dim() == 2 and args[0].dim() > 1:
            return product(args[0], args[1].T)
        if func is torch.addmm and not kwargs:
            return product(args[1], args[2].T, args[0])
        if func in ELEMENTWISE:
            return elementwise(lambda x: func(x, *args[1:], **kwargs), args[0])
        return func(*args, **kwargs)


LINEAR = {torch.nn.functional.linear}
MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm}
ELEMENTWISE = {
    torch.sigmoid,
    torch.Tensor.sigmoid,
    torch.tanh,
    torch.Tensor.tanh,
    torch.exp,
    torch.Tensor.exp,
    torch.nn.functional.silu,
    torch.nn.functional.gelu,
    torch.nn.functional.softplus,
}


def row(exact: bool = False) -> str:
    """Which linears the engine has on a CPU in fp32; nothing stands for torch's own, whose order is not fixed."""
    if not lacks("linear"):
        return "compiled linear (one order of sums)"
    return f"torch's linear in calls of {ROWS} rows" if exact else ""
