"""What `precision` means on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Params = Literal["fp32", "bf16"]
"""What weights are held in."""
Compute = Literal["fp32", "bf16", "fp16", "fp8"]
"""What products run in."""
Reading = Literal["auto", "fp32", "bf16", "bf16_mixed"]
"""How a model is held that is only read."""
KINDS: dict[str, tuple[Params, Compute]] = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "bf16_mixed": ("fp32", "bf16"),
    "fp16_mixed": ("fp32", "fp16"),
    "fp8": ("fp32", "fp8"),
}
"""The type of weights, and of products, by what the two are called together."""
NAMES: dict[tuple[Params, Compute], str] = {kinds: name for name, kinds in KINDS.items()}


@dataclass(frozen=True)
class Types:
    """The type that weights are held in, and the one that products run in."""

    name: str
    params: Params
    compute: Compute

    @property
    def mixed(self) -> bool:
        """Whether products run under autocast."""
        return self.compute != self.params

    @property
    def half(self) -> bool:
        """Whether attention computes in 16 bits."""
        return self.compute != "fp32"

    @property
    def short(self) -> Literal["bf16", "fp16"]:
        """The 16 bits of autocast; what fp8 does not take is done in bf16."""
        return "fp16" if self.compute == "fp16" else "bf16"


def types(precision: str, device: str) -> Types:
    """`auto` is fp32 on CPU and bf16_mixed on GPUs."""
    name = {"cpu": "fp32", "cuda": "bf16_mixed"}[device] if precision == "auto" else precision
    return Types(name, *KINDS[name])


def reading(precision: str, device: str) -> Types:
    """Of a model that is asked and not trained: `auto` is fp32 on CPU and bf16 on GPUs, where weights in fp32 would
    take twice the room and be made short anew for every product."""
    return types({"cpu": "fp32", "cuda": "bf16"}[device] if precision == "auto" else precision, device)
