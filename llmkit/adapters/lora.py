"""LoRA through peft, with the update of plain linears made in one pass each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from llmkit.adapters.method import Around
from llmkit.adapters.names import found
from llmkit.adapters.node import Lora
from llmkit.adapters.select import modules, parameters
from llmkit.adapters.starts import freeze, start
from llmkit.adapters.together import Part, Together, lora_linears
from llmkit.adapters.tokens import token_rows
from llmkit.core.errors import ModelError
from llmkit.core.recast import recast

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one module that read the same input in every family that has them."""


def attach(model: Any, node: Lora, around: Around) -> PeftModel:
    """A PeftModel over `model`, its linears replaced in place; adapters are fp32 whatever the base is.

    Raises:
        ModelError: what the node names is not in this model.
    """
    targets, params = modules(model, node, around), parameters(model, node, around.idle)
    names = [name for name, _ in model.named_modules() if name]
    whole = [name for ending in node.modules_to_save for name in found(ending, names, "adapter.modules_to_save")]
    rows = token_rows(model, node, around)
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    settings = LoraConfig(
        r=node.rank,
        lora_alpha=cast(int, node.alpha),
        lora_dropout=node.dropout,
        target_modules=targets,
        target_parameters=params or None,
        modules_to_save=whole or None,
        trainable_token_indices=rows or None,
        ensure_weight_tying=tied and _ties(model, whole),
        use_dora=node.dora,
        use_rslora=node.rslora,
        task_type=task_of(model),
    )
    try:
        adapted = cast(PeftModel, get_peft_model(model, settings))
    except (ValueError, TypeError) as cause:
        what = f"peft cannot put LoRA on {type(model).__name__} ({str(cause).strip().splitlines()[0][:200]})"
        raise ModelError(what, fix="give other targets", key="adapter") from cause
    start(adapted, node, around)
    if node.lora_fa:
        for module in adapted.modules():
            if isinstance(module, LoraLayer) and "default" in module.lora_A:
                freeze(module.lora_A["default"])
    around.notice(f"LoRA on {_count(adapted)}")
    return cast(PeftModel, fuse(adapted))


def task_of(model: Any) -> TaskType:
    """What peft calls the model's task: of a classifier it saves the head too."""
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        return TaskType.SEQ_CLS
    return TaskType.TOKEN_CLS if kind.endswith("ForTokenClassification") else TaskType.CAUSAL_LM


def _ties(model: Any, whole: Sequence[str]) -> bool:
    """Whether a module that is trained whole shares its weight with another."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(model.get_submodule(name) in ends for name in whole)


def _count(adapted: Any) -> str:
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    experts = sum(isinstance(module, ParamWrapper) for module in layers)
    parts = [f"{len(layers) - experts} linears", f"{experts} expert tensors" if experts else ""]
    return " and ".join(filter(None, parts))


def fuse(model: nn.Module) -> nn.Module:
    """Replaces peft's LoRA linears over plain linears by ones that do the same sums in fewer passes."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is PeftLinear and isinstance(child.base_layer, nn.Linear):
                setattr(parent, name, recast(child, FusedLora))
        for names in SAME_INPUT:
            members = [getattr(parent, name, None) for name in names]
            if all(isinstance(member, FusedLora) for member in members):
                group = Together(cast(Any, members))
                for member in members:
                    cast(Any, member).together = group
    return model


class FusedLora(PeftLinear):  # type: ignore[misc]
    """peft's LoRA linear; one plain adapter in use takes the fused way, all else is peft's."""

    together: Together | None = None
    """The linears that read the same input as this one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out)."""
        part = None if args or kwargs else self.part(x)
        if part is None:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        alone = self.together is None or self not in self.together.members  # a twin of one that is
        return lora_linears(x, [part])[0] if alone else cast(Together, self.together).output(self, x)

    def part(self, x: Tensor) -> Part | None:
        """What the fused way needs to know for this input; None where it has to be peft's."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        special = self.disable_adapters or self.merged or any(name in self.lora_variant for name in names)
        if special or not names:
            return None
        downs, ups = ([part[name] for name in names] for part in (self.lora_A, self.lora_B))
        scales, base = {self.scaling[name] for name in names}, self.base_layer
        half = _autocast(x)
        known = type(base).__module__.startswith(("torch.", "llmkit."))  # fp8 has its own way
        if half is not None and not (known and base.weight.dtype == half):
            return None  # a copy of each weight would be kept for the backward pass
        alike = half is not None or all(x.dtype == down.weight.dtype for down in downs)
        plain = alike and all(up.bias is None for up in ups)
        if not plain or len(scales) > 1 or base.weight.requires_grad:
            return None
        if self.training and not all(isinstance(self.lora_dropout[name], nn.Identity) for name in names):
            return None
        down, up = _joined([one.weight for one in downs], 0), _joined([one.weight for one in ups], 1)
        given = (base.weight, base.bias, down, up)
        made = given if half is None else [None if t is None else t.to(half) for t in given]
        return Part._make((*made, scales.pop()))

    def state(self) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]] | None:
        """What `part` follows from beside its input and autocast, to be compared with what it was, and the tensors that
        it gives then; None where these would be copies, or come from elsewhere than a parameter."""
        inner, active = self._modules, self._active_adapter
        name = active if type(active) is str else active[0] if len(active) == 1 else ""
        down, up = inner["lora_A"]._modules.get(name), inner["lora_B"]._modules.get(name)
        if down is None or up is None:
            return None
        base, low, high = inner["base_layer"]._parameters, down._parameters, up._parameters
        weight, first, second = base.get("weight"), low.get("weight"), high.get("weight")
        if weight is None or first is None or second is None:
            return None
        on = self._disable_adapters, bool(self.merged_adapters), name in self.lora_variant, self.scaling[name]
        rest = self.training, inner["lora_dropout"]._modules.get(name), high.get("bias") is None
        return (*on, *rest), (weight, base.get("bias"), first, second)


def _autocast(x: Tensor) -> torch.dtype | None:
    """The type that products are made in by autocast, where it is on."""
    where = x.device.type
    return torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else None


def _joined(parts: Sequence[Tensor], along: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), along)
