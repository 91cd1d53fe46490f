"""LoRA through peft, with the update of plain linears made in one pass each way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from llmkit.adapters.node import Lora
from llmkit.adapters.together import Part, Together, lora_linears
from llmkit.core.errors import ModelError
from llmkit.core.recast import recast

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one module that read the same input in every family that has them."""


def attach(model: Any, node: Lora, idle: Sequence[str] = ()) -> PeftModel:
    """A PeftModel over `model`, its linears replaced in place; adapters are fp32 whatever the base is.

    Raises:
        ModelError: `targets` names no linear of this model.
    """
    targets = list(node.targets) if isinstance(node.targets, tuple) else node.targets
    settings = LoraConfig(
        r=node.rank,
        lora_alpha=cast(int, node.alpha),
        lora_dropout=node.dropout,
        target_modules=targets,
        exclude_modules=_excluded(model, node, idle),
        use_dora=node.dora,
        use_rslora=node.rslora,
        task_type=task_of(model),
    )
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as cause:
        raise ModelError(
            f"{node.targets!r} names no linear of {type(model).__name__} ({str(cause).splitlines()[0]})",
            fix=f"use all-linear, or name endings such as {', '.join(_linears(model)[:4])}",
            key="adapter.targets",
        ) from cause
    return cast(PeftModel, fuse(adapted))


def task_of(model: Any) -> TaskType:
    """What peft calls the model's task: of a classifier it saves the head too."""
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        return TaskType.SEQ_CLS
    return TaskType.TOKEN_CLS if kind.endswith("ForTokenClassification") else TaskType.CAUSAL_LM


def _excluded(model: nn.Module, node: Lora, idle: Sequence[str]) -> str | None:
    """A regular expression over what gets no adapter. Most mixture models keep their routers in bare parameters, which
    `all-linear` does not reach; those of the others stay as they are too."""
    parts = [re.escape(name) for name in idle]
    if node.targets == "all-linear" and any(name.endswith(".router") for name, _ in model.named_modules()):
        parts.append(r".*\.router")
    return rf"({'|'.join(parts)})(\..*)?" if parts else None


def _linears(model: nn.Module) -> list[str]:
    """The last parts of the names of the model's linears."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


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
        return lora_linears(x, [part])[0] if self.together is None else self.together.output(self, x)

    def part(self, x: Tensor) -> Part | None:
        """What the fused way needs to know for this input; None where it has to be peft's."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        special = self.disable_adapters or self.merged or name in self.lora_variant
        if special or name not in self.lora_A or torch.is_autocast_enabled(x.device.type):
            return None
        down, up, base = self.lora_A[name].weight, self.lora_B[name], self.base_layer
        if x.dtype != down.dtype or up.bias is not None or base.weight.requires_grad:
            return None
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return None
        return Part(base.weight, base.bias, down, up.weight, self.scaling[name])
