"""One of each make is tried, and what is not alike is not taken for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmkit.models.alike import Once, make
from llmkit.models.families import tiny
from llmkit.models.fused import FusedMlp, fuse, gated


class Scaled(nn.Module):
    """A gated MLP, by its parts, that multiplies its result."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn, self.by = nn.SiLU(), by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., 4) -> (..., 4)."""
        made: torch.Tensor = self.by * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return made


def twice(module: Any) -> Any:
    inner = module.forward
    module.forward = lambda x: 2 * inner(x)
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _, __, out: 2 * out)
    return module


def test_one_of_each_make_is_asked() -> None:
    asked: list[nn.Module] = []
    mlps = [Scaled(1.0), Scaled(1.0), Scaled(2.0), Scaled(1.0).double(), hooked(Scaled(1.0)), twice(Scaled(1.0))]
    once = Once()

    def ask(module: nn.Module) -> bool:
        asked.append(module)
        return gated(module)

    assert [once(ask, mlp) for mlp in mlps] == [True, True, False, True, False, False]
    assert asked == [mlps[0], *mlps[2:]]


def test_what_hangs_on_a_part_counts() -> None:
    one, other = Scaled(1.0), Scaled(1.0)
    assert make(one) == make(other)
    hooked(other.up_proj)
    assert make(one) != make(other)


def test_a_layer_that_is_not_as_the_others_is_not_fused() -> None:
    model = tiny("Llama")
    hooked(model.model.layers[1].mlp)
    assert fuse(model)["mlp"] == len(model.model.layers) - 1
    assert [isinstance(layer.mlp, FusedMlp) for layer in model.model.layers] == [True, False]
