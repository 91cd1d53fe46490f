"""The factor on an fp16 loss that keeps small gradients above zero (arXiv:1710.03740)."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.core.errors import ResourceError

GROWTH_STEPS = 2000
"""Steps without an overflow after which the factor is doubled."""


@dataclass
class Scaler:
    """Halved when a gradient overflows, doubled after many steps without: always a power of two, so exact."""

    scale: float = 65536.0
    good: int = 0

    def fine(self) -> None:
        """A step was applied."""
        self.good += 1
        if self.good >= GROWTH_STEPS:
            self.scale, self.good = self.scale * 2, 0

    def halve(self) -> None:
        """A gradient overflowed.

        Raises:
            ResourceError: it did so again and again, down to a factor of 1.
        """
        if self.scale <= 1:
            raise ResourceError(
                "gradients overflow in fp16 step after step, even with the loss unscaled",
                fix="set precision=bf16_mixed or fp32, or lower optim.lr; the last checkpoint is untouched",
                key="precision",
            )
        self.scale, self.good = self.scale / 2, 0
