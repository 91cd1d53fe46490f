"""Which modules and parameters of a loaded model get an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmkit.adapters.names import ALL_LINEAR, check_layers, found, in_layers, layer_of, short, targeted
from llmkit.adapters.node import Lora
from llmkit.core.errors import ModelError

LINEAR = (nn.Linear, Conv1D)


def modules(model: Any, node: Lora, idle: Sequence[str]) -> list[str]:
    """The names by which peft finds what `targets` and `layers` mean: all linears but the head and routers, or what is
    named; nothing in `idle` modules.

    Raises:
        ModelError: a target, or a layer, names nothing.
    """
    check_layers(node.layers, depth(model))
    named = [(name, module) for name, module in model.named_modules() if not _within(name, idle)]
    linear = [(name, module) for name, module in named if isinstance(module, LINEAR)]
    head, router = model.get_output_embeddings(), (".router", ".gate")
    every = [name for name, module in linear if module is not head and not name.endswith(router)]
    able = [name for name, module in named if isinstance(module, (*LINEAR, nn.Embedding))]
    if isinstance(node.targets, tuple):
        for target in node.targets:
            found(target, able, "adapter.targets", fix=_known(every))
    names = every if node.targets == ALL_LINEAR else able
    chosen = [n for n in names if targeted(node.targets, n) and in_layers(node.layers, n, depth(model))]
    if not chosen and not (node.parameters and not node.targets):
        what = f"{node.targets!r} names no linear of {type(model).__name__}"
        raise ModelError(what, fix=_known(every), key="adapter.targets")
    return short(chosen, (name for name, _ in model.named_modules()))


def parameters(model: Any, node: Lora, idle: Sequence[str]) -> list[str]:
    """The parameters that `parameters` and `layers` mean: weights of experts and of routers, which are no linears.

    Raises:
        ModelError: one names nothing.
    """
    plain = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (*LINEAR, nn.Embedding))}
    able = [n for n, p in model.named_parameters() if p.ndim in (2, 3) and n not in plain and not _within(n, idle)]
    if node.parameters and not able:
        what, fix = f"{type(model).__name__} has no experts", "leave it out: targets reaches all linears"
        raise ModelError(what, fix=fix, key="adapter.parameters")
    chosen = {name for pattern in node.parameters for name in found(pattern, able, "adapter.parameters")}
    return sorted(name for name in chosen if in_layers(node.layers, name, depth(model)))


def depth(model: nn.Module) -> int:
    """How many layers a model has."""
    return 1 + max((layer_of(name) or 0 for name, _ in model.named_modules()), default=0)


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _known(linears: Sequence[str]) -> str:
    endings = sorted({name.rpartition(".")[2] for name in linears})
    return f"use all-linear, or name endings such as {', '.join(endings[:4])}"
