"""What a family does to its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """What a family does to its logits after the product: `cap * tanh(scale * z / cap)`; cap 0 is none."""

    scale: float = 1.0
    cap: float = 0.0

    def apply(self, logits: Tensor) -> Tensor:
        """The final logits."""
        scaled = logits * self.scale if self.scale != 1.0 else logits
        return torch.tanh(scaled / self.cap) * self.cap if self.cap else scaled

    def at(self, temperature: float) -> Shape:
        """The same with final logits that are divided by a temperature."""
        return self if temperature == 1.0 else Shape(self.scale / temperature, self.cap / temperature)

    def slope(self, final: Tensor) -> Tensor | None:
        """d final / d raw over `scale`, or None where that is 1 everywhere."""
        return 1 - (final / self.cap).square() if self.cap else None


def slices(length: int, size: int) -> list[slice]:
    """[0, length) in slices of `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
