"""The machine's own figures of a step."""

from __future__ import annotations

import torch

from llmkit.core.memory import peak
from llmkit.core.shape import Shape
from llmkit.plan.devices import recognised
from llmkit.train.fit import StepData


def measure(
    shape: Shape, device: str, half: bool, adapted: bool, ranks: int, data: StepData, seconds: float
) -> dict[str, float]:
    """Tokens a second of all ranks, without padding; the share of their devices' peak is told where it is known."""
    speed = data.tokens / max(seconds, 1e-9)
    share = 2 / 3 if adapted else 1.0
    flops = 6 * share * shape.active * speed
    top = ranks * _peak_flops(device, half)
    return {
        "tokens_per_second": speed,
        "mfu": flops / top if top else 0.0,
        "peak_memory_bytes": float(peak(device)),
    }


def _peak_flops(device: str, half: bool) -> float:
    """Of the devices whose data sheets we know, dense; elsewhere 0: unknown."""
    found = recognised(torch.cuda.get_device_name()) if device == "cuda" else None
    return 0.0 if found is None else found.half if half else found.single
