"""The recipe's `schedule` node: the factor on the rate at each step."""

from __future__ import annotations

import math
from typing import Literal

from llmkit.core.config import config, setting


def _ramp(step: int, steps: int, warmup: float) -> tuple[float, float]:
    """The warm-up factor of a 1-based step, and the share (0 to 1) of the rest of the run that lies behind it."""
    first = round(warmup * steps) if warmup < 1 else int(warmup)
    if step <= first:
        return step / first, 0.0
    return 1.0, (step - 1 - first) / max(1, steps - first)


@config
class Constant:
    """The full rate after the warm-up."""

    kind: Literal["constant"] = "constant"
    warmup: float = setting(default=0.0, least=0.0)
    """Steps, or a share of the run when below 1."""

    def __call__(self, step: int, steps: int) -> float:
        """The factor on the rate at 1-based `step` of `steps`."""
        return _ramp(step, steps, self.warmup)[0]


@config
class Linear:
    """A straight line from the full rate to `floor` of it."""

    kind: Literal["linear"] = "linear"
    warmup: float = setting(default=0.0, least=0.0)
    """Steps, or a share of the run when below 1."""
    floor: float = setting(default=0.0, least=0.0, most=1.0)

    def __call__(self, step: int, steps: int) -> float:
        """The factor on the rate at 1-based `step` of `steps`."""
        ramp, done = _ramp(step, steps, self.warmup)
        return ramp * (1 - (1 - self.floor) * done)


@config
class Cosine:
    """Half a cosine from the full rate to `floor` of it (arXiv:1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    warmup: float = setting(default=0.03, least=0.0)
    """Steps, or a share of the run when below 1."""
    floor: float = setting(default=0.0, least=0.0, most=1.0)

    def __call__(self, step: int, steps: int) -> float:
        """The factor on the rate at 1-based `step` of `steps`."""
        ramp, done = _ramp(step, steps, self.warmup)
        return ramp * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)


@config
class Wsd:
    """Warm-up, stable, then a linear decay over the last `decay` of the run (arXiv:2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    warmup: float = setting(default=0.0, least=0.0)
    """Steps, or a share of the run when below 1."""
    decay: float = setting(default=0.2, least=0.0, most=1.0)
    floor: float = setting(default=0.0, least=0.0, most=1.0)

    def __call__(self, step: int, steps: int) -> float:
        """The factor on the rate at 1-based `step` of `steps`."""
        ramp, _ = _ramp(step, steps, self.warmup)
        falling = max(1, round(self.decay * steps))
        left = (steps - step + 1) / falling
        return ramp * (self.floor + (1 - self.floor) * min(1.0, left))


Schedule = Constant | Linear | Cosine | Wsd
