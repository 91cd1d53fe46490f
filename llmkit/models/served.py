"""The modules of a serving twin: those of a model under other forwards, with the same parameters and names."""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import torch
from llmkit_kernels.build import lacks
from llmkit_kernels.gated import silu_mul
from llmkit_kernels.linear import Ready
from llmkit_kernels.norm import rms_norm
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from llmkit.models.ordered import Ordered, elementwise
from llmkit.models.served_linears import Asked, Forward, free, ready

TOGETHER = 64
"""Rows that a norm is given at once, where their number matters."""
STRETCH = 1024
"""Positions of which rotations are made at once."""


class ServedMlp(nn.Module):
    """A gated MLP that keeps nothing."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    @cached_property
    def both(self) -> Asked[Ready]:
        """What the first two were found to do."""
        return Asked(ready)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        rows, inner = x.reshape(-1, x.shape[-1]), [self._modules["gate_proj"], self._modules["up_proj"]]
        if free(inner) and (both := self.both.ready(rows, inner)) is not None:
            made = both.gated(rows)
            return cast(Tensor, self.down_proj(made.view(*x.shape[:-1], made.shape[1])))
        left, right = self.gate_proj(x), self.up_proj(x)
        made = elementwise(silu, left) * right if lacks("gated") else silu_mul(left, right)
        return cast(Tensor, self.down_proj(made))


class ServedNorm(nn.Module):
    """A root-mean-square norm that keeps nothing."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        return rms_norm(x, self.weight, self.variance_epsilon)


class ServedShiftedNorm(nn.Module):
    """The same of a family that keeps the weight's distance from 1 (Gemma)."""

    weight: nn.Parameter
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        return rms_norm(x, 1.0 + self.weight, self.eps)


def over_whole_vectors(forward: Forward) -> Forward:
    """An activation that gives each element the same wherever it lies."""

    def run(x: Tensor) -> Tensor:
        return elementwise(forward, x)

    return run


def by_rows(forward: Forward) -> Forward:
    """A norm in calls of one number of rows: on a GPU how a sum is shared out depends on how many there are."""

    def run(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        whole = pad(rows, (0, 0, 0, -len(rows) % TOGETHER))
        made = torch.cat([forward(part) for part in whole.split(TOGETHER)])
        return made[: len(rows)].view(x.shape)

    return run


def in_order(forward: Forward) -> Forward:
    """A forward whose functions have one order."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with Ordered():
            return forward(*args, **kwargs)

    return run


class Turned:
    """Rotations from a table by position, made by the family's own module in stretches of one size."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.tables: dict[Any, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1, T, D) of positions (1, T)."""
        key, last = (x.dtype, x.device, layer_type), int(position_ids.max())
        if key not in self.tables or len(self.tables[key][0]) <= last:
            self.tables[key] = self._made(x, last, layer_type)
        cos, sin = (table.index_select(0, position_ids.reshape(-1)) for table in self.tables[key])
        return cos.view(*position_ids.shape, -1), sin.view(*position_ids.shape, -1)

    def _made(self, x: Tensor, last: int, layer_type: str | None) -> tuple[Tensor, Tensor]:
        kind = {} if layer_type is None else {"layer_type": layer_type}
        stretches = torch.arange(-(-(last + 1) // STRETCH) * STRETCH, device=x.device).split(STRETCH)
        parts = [self.forward(x, stretch[None], **kind) for stretch in stretches]
        return torch.cat([cos[0] for cos, _ in parts]), torch.cat([sin[0] for _, sin in parts])
