"""Linears of a serving twin: what each does to rows, asked for once and held until something of it changes.

Between two steps of the engine a training step may have passed: an adapter may be switched, merged or taken off, a
weight replaced. To ask linears what they do takes as long as a narrow product; to see that they are as they were, a
fifth of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import torch
from llmkit_kernels import linear
from torch import Tensor, nn

from llmkit.models.ordered import product

Forward = Callable[..., Any]
T = TypeVar("T")


class ServedLinear(nn.Linear):
    """A linear whose rows do not depend on each other."""

    @cached_property
    def asked(self) -> Asked[linear.Ready]:
        """What it was found to do."""
        return Asked(ready)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        ready = self.asked.ready(rows, [self])
        return (
            product(x, self.weight, self.bias) if ready is None else ready.many(rows).view(*x.shape[:-1], ready.width)
        )


class Part(NamedTuple):
    """One linear: y = x weight' + bias, and what a LoRA adds."""

    weight: Tensor
    bias: Tensor | None
    low: linear.Low | None


class Lowered(Protocol):
    """A linear with a LoRA on it that may say what it does."""

    def part(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float] | None:
        """For this input the weight, the bias, `down`, `up` and the scale, where that is all that it does."""
        ...

    def state(self) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]] | None:
        """What that follows from beside the input and autocast, and the tensors that are given then; nothing, where
        these are copies."""
        ...


class ServedLora:
    """The forward of a linear with a LoRA on it, in one call; where it does more than that, its own."""

    def __init__(self, forward: Forward) -> None:
        self.forward, self.asked = forward, Asked(ready)
        self.module: Lowered = cast(Any, forward).__self__

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (..., in) -> (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        ready = None if args or kwargs else self.asked.ready(rows, [self.module])
        if ready is None:
            return self.forward(x, *args, **kwargs)
        return ready.many(rows).view(*x.shape[:-1], ready.width)

    def part(self, rows: Tensor) -> Part | None:
        """As it is now, where the compiled row takes it."""
        told = self.module.part(rows)
        if told is None:
            return None
        weight, bias, down, up, scale = told
        fits = down.shape[0] <= linear.RANK and linear.suits(rows, weight, down, up)
        return Part(weight, bias, linear.Low(down, up, scale)) if fits else None


class Asked(Generic[T]):
    """What some linears were found to do, made into something that holds their addresses."""

    def __init__(self, make: Callable[[list[Part]], T]) -> None:
        self.make = make
        self.known: tuple[list[Any], T] | None = None
        """How they were then, and what was made."""

    def ready(self, rows: Tensor, linears: Sequence[Any], beside: Sequence[Any] = ()) -> T | None:
        """It, if the compiled row does these to rows (N, in). `beside`: what else it follows from, to be compared."""
        now = None if torch.is_autocast_enabled("cpu") or not linear.suits(rows) else state(linears)
        if now is not None:
            now += beside
            known = self.known
            if known is not None and known[0] == now:
                return known[1]
        told = parts(rows, linears)
        made = None if told is None else self.make(told)
        self.known = None if now is None or made is None else (now, made)
        return made


def state(linears: Sequence[Any]) -> list[Any] | None:
    """All that follows what these do to rows, to be compared; nothing, where that must not be held."""
    made = list[Any]()
    for one in linears:
        forward = one.__dict__.get("forward")
        if type(forward) is ServedLora:
            told = forward.module.state()
        elif type(one) is ServedLinear and forward is None:
            told = None if (own := _own(one)) is None else ((), own)
        else:
            return None
        if told is None:
            return None
        made += one, forward, told[0]
        for tensor in told[1]:
            if tensor is not None and (place := linear.place(tensor)) is None:
                return None
            made.append(None if tensor is None else place)
    return made


def _own(one: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias, where these are parameters of its own: what is pruned or normed makes them anew in each call."""
    held = one._parameters
    if held.get("weight") is None or "bias" not in held:
        return None
    return cast(Tensor, held["weight"]), held["bias"]


def free(linears: Sequence[Any]) -> bool:
    """Whether nothing comes of these but their product: nothing hangs on them, be it another adapter, a cut or what
    fetches weights from elsewhere."""
    return not any(one._forward_hooks or one._forward_pre_hooks for one in linears)


def parts(rows: Tensor, linears: Sequence[Any]) -> list[Part] | None:
    """What these do to rows (N, in), if the compiled row does it."""
    made = []
    for one in linears:
        forward, part = one.__dict__.get("forward"), None
        if type(forward) is ServedLora:
            part = forward.part(rows)
        elif type(one) is ServedLinear and forward is None:
            own = _own(one)
            part = Part(*own, None) if own is not None and linear.suits(rows, own[0]) else None
        if part is None:
            return None
        made.append(part)
    return made


def ready(told: Sequence[Part]) -> linear.Ready:
    """Parts with their addresses."""
    return linear.Ready([one.weight for one in told], [one.bias for one in told], [one.low for one in told])
