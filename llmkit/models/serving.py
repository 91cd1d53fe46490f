"""The serving twin of a model: modules of its own over the same parameters, whose rows do not depend on each other.

One set of weights serves training and serving: what changes them in place is seen at once. What differs is how a step
of many sequences is computed: in one order of sums (`ordered.py`) and with nothing kept for a backward pass.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from llmkit_kernels.build import lacks
from llmkit_kernels.norm import reference
from torch import Tensor, nn

from llmkit.core.errors import ModelError
from llmkit.core.recast import recast
from llmkit.models.adapter_order import disordered
from llmkit.models.attend import NAMES, registered
from llmkit.models.bare import twin
from llmkit.models.fused import FusedLinear, FusedMlp, FusedNorm, gated, root_mean_square
from llmkit.models.ordered import row
from llmkit.models.rotary import Turning, turns_by_sequence
from llmkit.models.served import (
    ServedMlp,
    ServedNorm,
    ServedShiftedNorm,
    Turned,
    by_rows,
    in_order,
    over_whole_vectors,
)
from llmkit.models.served_attention import shorten
from llmkit.models.served_layer import join
from llmkit.models.served_linears import ServedLinear, ServedLora


def serving(model: Any, exact: bool = False) -> Any:
    """A twin of `model` for the engine, in evaluation mode.

    Where linears are no fp32 on a CPU they stay as they are. `exact`: rows do not depend on each other also where the
    compiled linear is not there (on a GPU, without a compiler), at the price of products in calls of one size.

    Raises:
        ModelError: `exact` is asked of a model that lies on several devices, is quantised, is in 16 bits on a CPU, or
            turns by the length of sequences.
    """
    why = lacks_order(model, exact)
    if exact and why:
        raise ModelError(f"cannot be run exactly: {why}", fix="drop exact", key="exact")
    made = twin(model)
    if (exact and not why) or (not _elsewhere(model) and row()):
        _own_configs(made, exact)
        for parent in list(made.modules()):
            for name, child in list(parent.named_children()):
                parent._modules[name] = _served(child)
        if not _elsewhere(made) and not lacks("linear") and attends_in_order(made):
            shorten(made)
            join(made)
    return made


def lacks_order(model: Any, exact: bool = False) -> str:
    """Why rows of this model depend on each other in the engine, or nothing."""
    if why := disordered(model):
        return why
    if (why := _elsewhere(model)) and not (exact and _on_one_gpu(model)):
        return why
    if turns_by_sequence(model):
        return "its rotations follow the length of a sequence, so that keys depend on when they were made"
    if exact or (row() and attends_in_order(model)):
        return ""
    return "its attention is eager" if row() and not lacks("paged") else "nothing is compiled here (llmkit doctor)"


def _elsewhere(model: Any) -> str:
    for name, weight in model.named_parameters():
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return f"{name} is {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}, not fp32 on a CPU"
    return ""


def _on_one_gpu(model: Any) -> bool:
    """Whether all weights are plain numbers on one GPU."""
    kinds = {(weight.device, weight.is_floating_point()) for weight in model.parameters()}
    device, plain = next(iter(kinds))
    return len(kinds) == 1 and plain and device.type == "cuda" and not getattr(model, "is_quantized", False)


def _served(module: Any) -> nn.Module:
    if normal(module) and next(module.parameters()).device.type != "cpu":
        module.forward = by_rows(module.forward)
        return cast(nn.Module, module)
    for kind, suits in KINDS.items():
        if suits(module):
            return recast(module, kind)
    for wrap, suits in WRAPS:
        if suits(module):
            module.forward = wrap(module.forward)
            return cast(nn.Module, module)
    return cast(nn.Module, module)


def _shifted(module: Any) -> bool:
    """Whether a module is `(1 + weight) * x / rms(x)`: by its parts, and by trying it."""
    weight, eps = getattr(module, "weight", None), getattr(module, "eps", None)
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or weight.dim() != 1 or weight.is_meta:
        return False
    if isinstance(module, nn.LayerNorm) or len(inspect.signature(module.forward).parameters) != 1:
        return False
    x = torch.linspace(-1, 2, weight.numel(), device=weight.device, dtype=weight.dtype)[None]
    with torch.no_grad():
        return torch.allclose(module(x), reference.rms_norm(x, 1.0 + weight, eps), rtol=1e-5, atol=1e-6)


def normal(module: Any) -> bool:
    """Whether a module sums over the last of its input's sizes: a norm, of whatever family."""
    held = dict(module.named_parameters()) if not list(module.children()) else {}
    takes = len(inspect.signature(module.forward).parameters) == 1
    return takes and "norm" in type(module).__name__.lower() and set(held) <= {"weight", "bias"} and bool(held)


def _activation(module: nn.Module) -> bool:
    return type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation")


def _own_weights(module: nn.Module) -> bool:
    """Whether a module has matrices of its own that no submodule of torch's multiplies with: a router, experts."""
    known = isinstance(module, nn.Linear | nn.Embedding) or type(module).__module__.startswith("torch.nn.")
    return not known and any(p.dim() > 1 for p in module.parameters(recurse=False))


def _lowered(module: nn.Module) -> bool:
    """Whether a module is a linear with a LoRA on it that says what it does."""
    return callable(getattr(module, "part", None)) and isinstance(getattr(module, "base_layer", None), nn.Linear)


def _own_configs(made: Any, exact: bool) -> None:
    """Has experts computed one by one, in the order of their numbers, so that each token's sum has one order; and
    attention in one order too, where the compiled one is not there."""
    kind = registered("ordered") if exact and not attends_in_order(made) else ""
    known: dict[int, Any] = {}
    for module in (module for module in made.modules() if hasattr(module, "config")):
        own = known.setdefault(id(module.config), copy.copy(module.config))
        if getattr(own, "_experts_implementation", None) is not None:
            own._experts_implementation_internal = "eager"
        if kind:
            own._attn_implementation_internal = kind
        module.config = own


def attends_in_order(model: Any) -> bool:
    """Whether the compiled attention over cached keys is used."""
    here = next(model.parameters()).device.type == "cpu"
    return here and not lacks("paged") and model.config.get_text_config()._attn_implementation != NAMES["eager"]


def _steady_rotary(module: Any) -> bool:
    """Whether a module gives cosines and sines by position alone: by its parts, and by trying it."""
    takes = list(inspect.signature(module.forward).parameters)
    if isinstance(module, Turning) or not hasattr(module, "inv_freq") or takes[:2] != ["x", "position_ids"]:
        return False
    with torch.no_grad():
        made = module(torch.zeros(1), torch.arange(3)[None])
    return isinstance(made, tuple) and len(made) == 2 and all(part.shape[:2] == (1, 3) for part in made)


KINDS: dict[type[nn.Module], Callable[[nn.Module], bool]] = {
    ServedLinear: lambda module: type(module) in (nn.Linear, FusedLinear),
    ServedMlp: lambda module: isinstance(module, FusedMlp) or gated(module),
    ServedNorm: lambda module: isinstance(module, FusedNorm) or root_mean_square(module),
    ServedShiftedNorm: _shifted,
}
"""What a module becomes, and whether it is one of those."""
WRAPS: tuple[tuple[Callable[[Any], Any], Callable[[Any], bool]], ...] = (
    (over_whole_vectors, _activation),
    (Turned, _steady_rotary),
    (in_order, _own_weights),
    (ServedLora, _lowered),
)
"""The same for modules that keep their class under another forward."""
