"""A base whose weights bitsandbytes holds: that it does, that the family runs so, and its layout."""

from __future__ import annotations

from typing import Any

import torch

from llmkit.core.errors import ModelError
from llmkit.core.memory import is_out_of_memory


def settle(model: Any) -> None:
    """Keeps the plain layout of 4-bit weights: on CPUs with bf16 dot products bitsandbytes repacks one in its first
    evaluation, and later gradients are wrong.

    Raises:
        ModelError: nothing is quantised: transformers passes linears of a class of their own by, and says nothing.
    """
    if not any("bitsandbytes" in type(module).__module__ for module in model.modules()):
        what = f"none of the linears of {type(model).__name__} can be quantised"
        raise ModelError(what, fix="drop quant", key="quant.kind")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_runs(model: Any) -> None:
    """Raises:
    ModelError: the family reads weights past their modules, as Mamba does, and cannot read quantised ones.
    """
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.tensor([[1, 2]], device=model.device), use_cache=False)
    except (RuntimeError, TypeError, ValueError) as cause:
        if is_out_of_memory(cause):
            raise
        why = (str(cause).splitlines() or [""])[0][:120]
        what = f"{type(model).__name__} does not run with quantised weights ({why})"
        raise ModelError(what, fix="drop quant", key="quant.kind") from cause
