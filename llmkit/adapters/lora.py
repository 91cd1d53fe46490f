"""LoRA through peft, with the update of plain linears made in one pass each way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmkit.adapters.node import Lora
from llmkit.core.errors import ModelError
from llmkit.core.matmul import linear, through
from llmkit.core.recast import recast
from llmkit.core.remake import Way, way_to


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
        task_type=TaskType.CAUSAL_LM,
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
    return model


class FusedLora(PeftLinear):  # type: ignore[misc]
    """peft's LoRA linear; one plain adapter in use takes the fused way, all else is peft's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out)."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        special = args or kwargs or self.disable_adapters or self.merged or name in self.lora_variant
        if special or name not in self.lora_A or torch.is_autocast_enabled(x.device.type):
            return cast(Tensor, super().forward(x, *args, **kwargs))
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        dropout = self.lora_dropout[name]
        base = self.base_layer
        if x.dtype != down.dtype or self.lora_B[name].bias is not None or base.weight.requires_grad:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        if isinstance(dropout, nn.Identity) or not self.training:
            given = (x, base.weight, base.bias, down, up, self.scaling[name], way_to(x))
            rows = cast(Any, _LoraLinear).apply(*given)
            return cast(Tensor, rows.view(*x.shape[:-1], rows.shape[-1]))
        return cast(Tensor, super().forward(x, *args, **kwargs))


class _LoraLinear(torch.autograd.Function):
    """y = x W' + b + s (x A') B' with W frozen: the update is added inside the product, and its input gradient too.

    x is of any shape, y in rows: a view that was made in here could not be changed in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, way: Way
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ down.T
        out = linear(rows, weight, bias)
        ctx.save_for_backward(weight, down, up, low, *way.sources)
        ctx.scale, ctx.shape, ctx.make = scale, x.shape, way.make
        return out.addmm_(low, up.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, down, up, low, *sources = ctx.saved_tensors
        rows = ctx.make(*sources).reshape(-1, ctx.shape[-1])
        to_low = (grad @ up).mul_(ctx.scale)
        to_up = (grad.T @ low).mul_(ctx.scale)
        to_x = through(grad, weight).addmm_(to_low, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return to_x, None, None, to_low.T @ rows, to_up, None, None
