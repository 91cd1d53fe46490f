"""Model -> adapter -> head -> stepper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from llmkit.adapters.method import Around
from llmkit.adapters.node import Adapter
from llmkit.build.precision import Types
from llmkit.core.errors import ModelError
from llmkit.models.classified import Classified, check_classes, head_name
from llmkit.models.heads import Headed, Scored, causal_of, check_head
from llmkit.models.layers import layers
from llmkit.models.load import DTYPES, How, Loaded, load
from llmkit.models.node import ModelRef, Quant
from llmkit.models.resolve import Resolved
from llmkit.models.stored import Stored
from llmkit.models.virtual import supported
from llmkit.models.wrappers import towers
from llmkit.parallel.offload import Offload, Pinned
from llmkit.parallel.optimizers import Optimizers
from llmkit.parallel.scaler import Scaler
from llmkit.parallel.steps import Parts, Ways


@dataclass(frozen=True)
class Built:
    """All that a stage needs of a model in training."""

    loaded: Loaded
    model: nn.Module
    """With its adapter."""
    scored: Headed
    trained: dict[str, nn.Parameter]
    beside: tuple[nn.Module, ...] = ()
    """Models, with their adapters, and heads that are trained beside it."""


def build(
    resolved: Resolved,
    ref: ModelRef,
    how: How,
    adapter: Adapter,
    recompute: int,
    seed: int,
    notice: Callable[[str], None] = lambda _: None,
) -> Built:
    """A model ready to be trained; every `recompute`-th layer makes its activations again, none at 0.

    Raises:
        ModelError: it cannot be loaded, or the adapter does not fit it.
    """
    if resolved.base is not None:
        raise ModelError(
            f"{ref.name} is an adapter; training goes on from a whole model", fix="merge it first", key="model"
        )
    loaded = load(resolved, ref, how)
    if loaded.head is not None and how.head is None:
        what = f"{ref.name} is a {loaded.head.task} classifier, not a language model"
        raise ModelError(what, fix="give its language model, or use kind: classify", key="model")
    with loaded.deferred.running():
        beside = _checked(loaded)
    torch.manual_seed(seed)  # adapters begin at random
    around = Around((*towers(loaded.model), *beside), loaded.tokenizer, loaded.added, Stored(resolved.folder), notice)
    model = adapter.attach(loaded.model, around)
    _train_head(loaded, beside, adapter)
    loaded = replace(loaded, support=supported(loaded.support, model))
    if recompute:
        base = loaded.model
        base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=int(recompute))
        model.train()
    scored = headed(loaded, model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ModelError("nothing is trained", fix="give adapter.targets that match", key="adapter")
    return Built(loaded, model, scored, trained)


def headed(loaded: Loaded, model: nn.Module) -> Headed:
    """A loaded model, or it with its adapter, and its head as one module."""
    if loaded.head is not None:
        return Classified(model, loaded.head, loaded.support.packed)
    return Scored(model, max(loaded.tokenizer.get_vocab().values(), default=0) + 1)


def check(scored: Headed) -> None:
    """Raises: ModelError when the head is not what the model itself does."""
    if isinstance(scored, Classified):
        check_classes(scored)
    elif isinstance(scored, Scored):
        check_head(scored)


def _checked(loaded: Loaded) -> tuple[str, ...]:
    """The names of a classifier's head, which no adapter goes on."""
    check(headed(loaded, loaded.model))
    return (head_name(loaded.model),) if loaded.head is not None else ()


def _own(key: str) -> bool:
    """Whether a parameter is a module's own, or that of its copy which peft saves whole."""
    return key in ("weight", "bias") or "modules_to_save" in key


def _train_head(loaded: Loaded, names: tuple[str, ...], adapter: Adapter) -> None:
    """A head is trained whole, whatever is trained beside it, and so is all else that is new.

    Raises:
        ModelError: the adapter would not save it.
    """
    for name in (*names, *loaded.fresh):
        module = loaded.model.get_submodule(name)
        if not adapter.frozen_base:
            module.requires_grad_(True)
        elif not any(p.requires_grad and _own(key) for key, p in module.named_parameters()):
            what = f"{name} is new, and adapter {adapter.kind} does not save it whole"
            raise ModelError(what, fix="use adapter: none", key="adapter.kind")


def parts(
    built: Built,
    optimizer: Callable[[Mapping[str, nn.Parameter]], Optimizers],
    types: Types,
    in_backward: bool = False,
    offload: bool = False,
) -> Parts:
    """What a strategy makes a stepper of; `in_backward` and `offload` are the levers of `memory`."""
    ways = Ways(
        DTYPES[types.short] if types.mixed else None,
        Scaler() if types.compute == "fp16" else None,
        in_backward,
        Offload(built.model.parameters(), Pinned()) if offload else None,
    )
    base = built.loaded.model
    plan, experts = dict(base._tp_plan or {}), dict(base._ep_plan or {})
    apart, twins = _layers_beside(built)
    return Parts(
        built.scored,
        built.trained,
        optimizer,
        ways,
        layers=(*layers(base), *apart),
        twins=twins,
        base=base,
        plan=plan,
        experts=experts,
        deferred=built.loaded.deferred,
    )


def _layers_beside(built: Built) -> tuple[list[nn.Module], list[tuple[nn.Module, nn.Module]]]:
    """The layers of models that are trained beside one: those that have weights of their own, and those that run the
    weights of a layer of the first, with that layer."""
    apart, twins = list[nn.Module](), list[tuple[nn.Module, nn.Module]]()
    first = layers(built.loaded.model)
    held = {id(p) for layer in first for p in layer.parameters()}
    for base in (causal_of(one) for one in built.beside if hasattr(causal_of(one), "config")):
        own = layers(base)
        if any(id(p) in held for layer in own for p in layer.parameters()):
            twins += zip(own, first, strict=True)
        else:
            apart += own
    return apart, twins


def how(device: str, types: Types, quant: Quant, adapter: Adapter, code: bool, nonfinite: bool) -> How:
    """How a stage's model is held: a frozen base under autocast is held in 16 bits already."""
    held: Any = types.short if types.mixed and adapter.frozen_base and device == "cuda" else types.params
    return How(device, held, types.half, quant, code, nonfinite, types.short)
