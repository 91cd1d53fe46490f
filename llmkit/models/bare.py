"""A model without its adapter: modules of its own over the same parameters, so that what is hung on them (hooks of
other adapters, of a cut) does not touch the model that is trained or scored beside it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

from llmkit.models.heads import causal_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def bare(model: Any) -> Any:
    """The base of a model, perhaps with a LoRA of peft on it: other modules, in evaluation mode, the same parameters
    and buffers."""
    made = _twin(causal_of(model), {}, True)
    made.__dict__.pop("peft_config", None)  # peft leaves it on the base too
    return made


def twin(model: Any) -> Any:
    """The same of a model with all that is on it."""
    return _twin(model, {}, False)


def _twin(module: Any, known: dict[int, nn.Module], bared: bool) -> nn.Module:
    """A module that stands at two places is one twin at both."""
    inner = module.base_layer if bared and hasattr(module, "lora_A") else module
    if id(inner) not in known:
        made = known[id(inner)] = copy.copy(inner)
        made.training = False
        for name in HOOKS:
            held = made.__dict__.get(name)
            made.__dict__[name] = OrderedDict(held) if held is not None else OrderedDict()
        made._modules = {
            name: _twin(child, known, bared) if child is not None else None for name, child in inner._modules.items()
        }
    return known[id(inner)]
