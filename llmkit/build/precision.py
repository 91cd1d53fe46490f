"""What `precision` means on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Types:
    """The type that weights are held in, and whether products run under bf16 autocast."""

    name: str
    params: Literal["fp32", "bf16"]
    mixed: bool

    @property
    def half(self) -> bool:
        """Whether attention computes in 16 bits."""
        return self.mixed or self.params == "bf16"


def types(precision: str, device: str) -> Types:
    """`auto` is fp32 on CPU and bf16_mixed on GPUs."""
    name = {"cpu": "fp32", "cuda": "bf16_mixed"}[device] if precision == "auto" else precision
    return Types(name, "bf16" if name == "bf16" else "fp32", name == "bf16_mixed")
