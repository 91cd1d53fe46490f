"""LoRA on a tiny model of a family, in fp64: against the chain rule through the merged model."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from llmkit.adapters.node import Lora
from llmkit.adapters.select import unread
from llmkit.core.errors import ModelError
from llmkit.models.attend import install
from llmkit.models.compare import BAR, Doubled, exact, off, packed_case, worst
from llmkit.models.families import tiny
from llmkit.models.support import YES

CHAIN = 1e-9
"""Bar of the chain rule: the factors' gradients are products of sums that are summed in another order."""
TOKENS = torch.arange(3, 14)[None]


def adapted(family: str, packs: bool) -> tuple[str, str]:
    """The columns `LoRA` and `merge`; `packs`: the family can be packed."""
    base = exact(tiny(family)).eval()
    install(base, "auto")
    try:
        model: Any = Lora(rank=2).attach(base).double()
    except ModelError as refused:
        return refused.problems[0].what, refused.problems[0].what
    filled(model)
    name = type(base).__name__
    apart = max(worst(model, packed_case(), base)) if packs else 0.0
    if apart > BAR:
        return f"{name} gives other values when it is packed through LoRA (off by {apart:.0e})", ""
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    with Doubled():
        wanted = through(model)
        if still := [path for path, layer in layers.items() if layer.lora_A["default"].weight.grad is None]:
            return f"{name} passes the adapter of {still[0]} by", ""
        whole = model.merge_and_unload()
        for path in layers:
            whole.get_submodule(path).weight.requires_grad_(True)
        merged = through(whole)
    fits = max(_by_chain_rule(layer, whole.get_submodule(path)) for path, layer in layers.items())
    learns = YES + _left(base) if fits <= CHAIN else f"{name}: gradients of LoRA are off by {fits:.0e}"
    folded = off(merged, wanted)
    return learns, YES if folded <= BAR else f"{name} is off by {folded:.0e} when it is merged"


def filled(model: Any) -> None:
    """Gives the factors values, the same in every model of a family; B would start at 0, where nothing could differ."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)


def through(model: Any) -> Tensor:
    """Logits (T, V), after a backward pass of their sum by fixed random factors."""
    out: Tensor = model(input_ids=TOKENS, use_cache=False).logits[0]
    by = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (out * by).sum().backward()
    return out.detach()


def experts(model: Any) -> bool:
    """Whether a model has experts that are no linears, but parameters of all of them together."""
    return any(parameter.ndim == 3 and "expert" in name for name, parameter in model.named_parameters())


def _left(model: Any) -> str:
    """What `all-linear` leaves out."""
    if past := unread(model):
        ends = {name.rpartition(".")[2] for name, _ in model.named_modules() if name in past}
        return f": none on {' and '.join(sorted(ends))} of its state spaces, whose weights are read past any adapter"
    return ": the experts are reached by `adapter.parameters`, not by all-linear" if experts(model) else ""


def _by_chain_rule(layer: Any, merged: Any) -> float:
    """How far the factors' gradients are from those that the merged weight's gradient makes."""
    a, b, s = (held["default"] for held in (layer.lora_A, layer.lora_B, layer.scaling))
    whole = merged.weight.grad.T if isinstance(merged, Conv1D) else merged.weight.grad
    return max(off(a.weight.grad, s * b.weight.T @ whole), off(b.weight.grad, s * whole @ a.weight.T))
