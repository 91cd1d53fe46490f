"""fp8: the linears of layers multiply in 8-bit floats, scaled tensor by tensor at each use (arXiv:2209.05433)."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from llmkit.core.errors import ModelError, ResourceError

CAPABILITY = (8, 9)
"""The first CUDA devices that multiply 8-bit floats."""
SIDE = 16
"""Sides of a matrix must be multiples of it."""


def check(device: str, capability: tuple[int, int]) -> None:
    """Sees to it that a device multiplies 8-bit floats and that torchao is there.

    Raises:
        ResourceError: the device cannot.
        ModelError: torchao is missing.
    """
    if device != "cuda" or capability < CAPABILITY:
        found = f"this one is {'.'.join(map(str, capability))}" if device == "cuda" else f"this device is a {device}"
        raise ResourceError(
            f"fp8 needs a CUDA device of capability 8.9 or later; {found}",
            fix="set precision=bf16_mixed, or fp32 on a CPU",
            key="precision",
        )
    library()


def library() -> Any:
    """What torchao has for training in fp8.

    Raises:
        ModelError: it is missing.
    """
    try:
        from torchao import float8
    except ImportError as missing:
        raise ModelError(f"fp8 needs torchao ({missing})", fix="pip install torchao", key="precision") from missing
    return float8


def convert(model: nn.Module, config: Any = None) -> int:
    """Puts fp8 linears in the place of those of layers, with the same parameters and names; tells how many.

    Raises:
        ModelError: torchao is missing, or no linear has sides that fit.
    """
    float8, taken = library(), []
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def wanted(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or module is head:
            return False
        fits = not module.in_features % SIDE and not module.out_features % SIDE
        taken.append(name) if fits else None
        return fits

    padded = config or float8.Float8LinearConfig(pad_inner_dim=True)  # a packed row has any number of tokens
    float8.convert_to_float8_training(model, module_filter_fn=wanted, config=padded)
    if not taken:
        what = f"fp8 needs linears whose sides are multiples of {SIDE}; this model has none"
        raise ModelError(what, fix="set precision=bf16_mixed", key="precision")
    return len(taken)
