"""LoRA linears of one input as one operation: their small products are made together, and one gradient of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from llmkit_kernels.linear import many, suits
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit.core.matmul import linear, through
from llmkit.core.remake import Way, way_to

FEW = 32
"""Rows up to which the linear that is made for few of them is the faster one: those of a step of the engine."""


class Part(NamedTuple):
    """One linear: y = x weight' + bias + scale (x down') up', with weight (out, in) and bias (out,) frozen."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scale: float


class Member(Protocol):
    """A linear that may be computed together with others."""

    def part(self, x: Tensor) -> Part | None:
        """What it does to this input, where it can be done here."""
        ...


class Together:
    """Linears that a model calls one after the other with the same input: the first call computes all of them."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.key: tuple[Any, ...] = ()
        self.made: dict[int, Tensor] = {}

    def output(self, member: Member, x: Tensor) -> Tensor:
        """The output of `member` for `x`; those of the others wait until they are asked for, or for another input."""
        key = (x, x._version, torch.is_grad_enabled())
        same = len(self.key) == 3 and self.key[0] is x and self.key[1:] == key[1:]
        if not same or id(member) not in self.made:
            parts = [(one, one.part(x)) for one in self.members]
            able = [(one, part) for one, part in parts if part is not None]
            made = lora_linears(x, [part for _, part in able])
            self.key, self.made = key, {id(one): out for (one, _), out in zip(able, made, strict=True)}
        out = self.made.pop(id(member))
        if not self.made:
            self.key = ()  # nothing of a finished forward is held
        return out


def lora_linears(x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """x (..., in) -> (..., out) for each part, in the type of its weight: under autocast x may have another."""
    if parts and x.dtype != parts[0].weight.dtype:
        x = x.to(parts[0].weight.dtype)  # once for all of them
    if x.numel() <= FEW * x.shape[-1] and not torch.is_grad_enabled() and suits(x, *_read(parts)):
        return _of_few(x, parts)
    flat = [tensor for part in parts for tensor in part[:4]]
    rows = cast(Any, _LoraLinears).apply(x, way_to(x), [part.scale for part in parts], *flat)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in rows)


def _read(parts: Sequence[Part]) -> list[Tensor]:
    return [*(part.weight for part in parts), *(part.down for part in parts)]


def _of_few(x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Few rows, of which no gradient is asked: each weight and each `down` is read once, in one call."""
    count, read = len(parts), _read(parts)
    made = many(x.reshape(-1, x.shape[-1]), read, [*(part.bias for part in parts), *[None] * count])
    split = made.split([len(one) for one in read], 1)
    for part, out, low in zip(parts, split, split[count:], strict=False):
        out.addmm_(low, part.up.T, alpha=part.scale)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in split[:count])


class _LoraLinears(torch.autograd.Function):
    """The updates are added inside of the products, and so are the parts of the input's gradient.

    x is of any shape, each y in rows: a view that was made in here could not be changed in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Way, scales: list[float], *flat: Tensor) -> tuple[Tensor, ...]:
        weights, biases, downs, ups = (flat[kind::4] for kind in range(4))
        rows, down = x.reshape(-1, x.shape[-1]), _stacked(downs)
        lows = (rows @ down.T).split([len(one) for one in downs], 1)
        ctx.learns = any(ctx.needs_input_grad[5::4])  # without it x is not kept
        ctx.save_for_backward(down, *weights, *ups, *lows, *(way.sources if ctx.learns else ()))
        ctx.scales, ctx.shape, ctx.make = scales, x.shape, way.make
        ctx.set_materialize_grads(False)
        given = zip(weights, biases, ups, lows, scales, strict=True)
        return tuple(linear(rows, w, bias).addmm_(low, up.T, alpha=scale) for w, bias, up, low, scale in given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(grads)
        down, *saved = ctx.saved_tensors  # once: recompute hands each over once
        weights, ups, lows = (saved[i * count : (i + 1) * count] for i in range(3))
        to_low = _stacked(
            [
                low.new_zeros(low.shape).T if grad is None else (grad @ up).mul_(scale).T
                for grad, up, low, scale in zip(grads, ups, lows, ctx.scales, strict=True)
            ]
        )
        to_x = _of_input(grads, weights, to_low, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        to_downs: Sequence[Tensor | None] = [None] * count
        if ctx.learns:
            rows = ctx.make(*saved[3 * count :]).reshape(-1, ctx.shape[-1])
            to_downs = (to_low @ rows).split([up.shape[1] for up in ups])
        to_flat: list[Tensor | None] = []
        for grad, low, scale, to_down in zip(grads, lows, ctx.scales, to_downs, strict=True):
            # (low' grad)' is thrice as fast as grad' low
            to_flat += [None, None, to_down, None if grad is None else (low.T @ grad).mul_(scale).T]
        return (to_x, None, None, *to_flat)


def _of_input(grads: Sequence[Tensor | None], weights: Sequence[Tensor], to_low: Tensor, down: Tensor) -> Tensor:
    total = to_low.T @ down
    for grad, weight in zip(grads, weights, strict=True):
        if grad is not None:
            total = through(grad, weight, total)
    return total


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
