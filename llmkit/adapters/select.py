"""Which modules and parameters of a loaded model get an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmkit.adapters.method import Around
from llmkit.adapters.names import ALL_LINEAR, ROUTER, check_layers, found, in_layers, layer_of, short, targeted
from llmkit.adapters.node import Lora
from llmkit.core.errors import ModelError

LINEAR = (nn.Linear, Conv1D)


def modules(model: Any, node: Lora, around: Around) -> list[str]:
    """The names by which peft finds what `targets` and `layers` mean: all linears but the head and routers, or what is
    named; nothing in idle modules.

    Raises:
        ModelError: a target, or a layer, names nothing, or what peft takes for something else.
    """
    idle = around.idle
    check_layers(node.layers, depth(model))
    named = [(name, module) for name, module in model.named_modules() if not _within(name, idle)]
    linear = [(name, module) for name, module in named if isinstance(module, LINEAR)]
    head = model.get_output_embeddings()
    past = unread(model)
    every = [name for name, module in linear if module is not head and not ROUTER.search(name) and name not in past]
    able = [name for name, module in named if isinstance(module, (*LINEAR, nn.Embedding))]
    if isinstance(node.targets, tuple):
        for target in node.targets:
            found(target, able, "adapter.targets", fix=_known(every))
    names = every if node.targets == ALL_LINEAR else able
    chosen = [n for n in names if targeted(node.targets, n) and in_layers(node.layers, n, depth(model))]
    if not chosen and not (node.parameters and not node.targets):
        what = f"{node.targets!r} names no linear of {type(model).__name__}"
        raise ModelError(what, fix=_known(every), key="adapter.targets")
    check_read(chosen, past)
    taken = _taken(model, chosen)
    chosen = [name for name in chosen if name.rpartition(".")[2] not in taken]
    if taken and (node.targets != ALL_LINEAR or not chosen):
        what = f"peft takes {' and '.join(taken)} of {type(model).__name__} for its experts"
        raise ModelError(what, fix="name other targets, and experts by adapter.parameters", key="adapter.targets")
    if taken:
        around.notice(f"linears called {', '.join(taken)} get no LoRA: peft takes their names for the experts'")
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


def _taken(model: Any, chosen: Sequence[str]) -> list[str]:
    """The last parts of names that peft reads as experts in this family, which had linears there once: it would adapt
    those, and not the shared expert or the dense layer that is meant."""
    taken = []
    for ending in sorted({name.rpartition(".")[2] for name in chosen}):
        probe = LoraConfig(target_modules=[ending])
        try:
            convert_peft_config_for_transformers(probe, model, None)
            known = ending in (probe.target_modules or ())
        except ValueError:  # one of two that are fused
            known = False
        taken += [] if known else [ending]
    return taken


def unread(model: nn.Module) -> set[str]:
    """Linears of Mamba's mixers whose weights are read past the module: the last ones by the fast kernels, those of
    the time step always."""
    mixers = {
        name: module
        for name, module in model.named_modules()
        if re.search("Mixer|Mamba", type(module).__name__) and any(isinstance(c, nn.Conv1d) for c in module.children())
    }
    return {f"{name}.{child}" for name in mixers for child in ("out_proj", "dt_proj")}


def check_read(chosen: Iterable[str], past: set[str]) -> None:
    """Raises:
    ModelError: something chosen is among what is read `past` the module.
    """
    if odd := sorted(past.intersection(chosen)):
        what = f"{odd[0]} is read by a kernel of the state space as a weight alone, past any adapter"
        raise ModelError(what, fix="leave it out of adapter.targets", key="adapter.targets")


def depth(model: nn.Module) -> int:
    """How many layers a model has."""
    return 1 + max((layer_of(name) or 0 for name, _ in model.named_modules()), default=0)


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _known(linears: Sequence[str]) -> str:
    endings = sorted({name.rpartition(".")[2] for name in linears})
    return f"use all-linear, or name endings such as {', '.join(endings[:4])}"
