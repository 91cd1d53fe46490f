"""What a strategy does around the steps of one process: which gradients are summed with whom, and what lies where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmkit.core.peers import Peers
from llmkit.core.sliced import Slice, whole

Sums = Mapping[str, tuple[float, ...]]


class Team(Protocol):
    """The ranks that make one step together, as `Steps` sees them."""

    def around(self, index: int, turns: int) -> AbstractContextManager[Any]:
        """Around the forward and backward pass of micro-batch `index` of `turns`."""
        ...

    def after(self, index: int, turns: int) -> None:
        """When that pass is done: after the last one the gradients are those of all ranks."""
        ...

    def totals(self, own: Sums) -> dict[str, tuple[float, ...]]:
        """Numbers by name, each summed over the ranks that saw different rows, in the order of the ranks."""
        ...

    def norm(self, params: Mapping[str, nn.Parameter]) -> float:
        """The norm of all gradients together."""
        ...

    def part(self, name: str, like: Tensor, value: Tensor) -> Tensor | Slice:
        """What this rank holds of a parameter (`like`), or of a state of its shape (`value`)."""
        ...

    def lying(self, name: str, p: Tensor) -> Sequence[Slice]:
        """What this rank holds of a parameter: blocks of it, or of it laid flat, in the memory of the parameter."""
        ...

    def own(self, name: str, like: Tensor, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, as `like` holds it."""
        ...

    def assemble(self, model: nn.Module, peers: Peers) -> None:
        """Makes the model's weights whole on the main rank, as they are exported; nothing runs it after that."""
        ...


class Whole:
    """What teams share whose ranks each hold all that they train, whole."""

    def around(self, index: int, turns: int) -> AbstractContextManager[Any]:
        """Nothing is put off."""
        return nullcontext()

    def after(self, index: int, turns: int) -> None:
        """Nothing is left to do."""

    def norm(self, params: Mapping[str, nn.Parameter]) -> float:
        """Of what lies here, which is all."""
        return norm(params.values())

    def part(self, name: str, like: Tensor, value: Tensor) -> Tensor | Slice:
        """All of it."""
        return value

    def lying(self, name: str, p: Tensor) -> Sequence[Slice]:
        """All of it."""
        return (whole(p.detach()),)

    def own(self, name: str, like: Tensor, whole: Tensor) -> Tensor:
        """All of it."""
        return whole

    def assemble(self, model: nn.Module, peers: Peers) -> None:
        """They are."""


class Solo(Whole):
    """One process, with nobody to share with."""

    def totals(self, own: Sums) -> dict[str, tuple[float, ...]]:
        """Its own numbers."""
        return dict(own)


def norm(params: Iterable[nn.Parameter]) -> float:
    """The norm of the gradients that lie in this process, each of them whole."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return 0.0
    if any(grad.device.type != "cpu" for grad in grads):
        return float(torch.nn.utils.get_total_norm(grads))
    return math.sqrt(sum(float(squares(grad)) for grad in grads))


BLOCK = 1 << 11
"""Numbers whose squares are summed in fp32: of many more, a CPU's sum of one after the other loses digits."""


def squares(grad: Tensor) -> Tensor:
    """The sum of the squares of one gradient, in fp64."""
    flat, wide = grad.detach().flatten(), torch.promote_types(grad.dtype, torch.float32)
    if grad.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(flat, dtype=wide)
        return norm.double().square()
    whole = flat.numel() // BLOCK * BLOCK
    parts = [part for part in (flat[:whole].view(-1, BLOCK), flat[whole:].view(1, -1)) if part.numel()]
    zero = torch.zeros((), dtype=torch.float64)
    rows = (torch.linalg.vector_norm(part, dim=1, dtype=wide).double() for part in parts)
    return sum((row.square().sum() for row in rows), zero)


def summed(said: Iterable[Sums]) -> dict[str, tuple[float, ...]]:
    """Sums of several ranks, added up in their order; one that lacks a name adds nothing to it."""
    found: dict[str, tuple[float, ...]] = {}
    for one in said:
        for name, values in one.items():
            before = found.get(name, (0.0,) * len(values))
            found[name] = tuple(a + b for a, b in zip(before, values, strict=True))
    return found
