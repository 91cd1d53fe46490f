"""The machine's own figures of a step."""

from __future__ import annotations

import torch

from llmkit.core.memory import peak
from llmkit.core.shape import Shape
from llmkit.train.fit import StepData


def measure(shape: Shape, device: str, half: bool, adapted: bool, data: StepData, seconds: float) -> dict[str, float]:
    """Tokens a second without padding; the share of the device's peak is told where the peak is known."""
    speed = data.tokens / max(seconds, 1e-9)
    share = 2 / 3 if adapted else 1.0
    flops = 6 * share * shape.params * speed
    top = _peak_flops(device, half)
    return {
        "tokens_per_second": speed,
        "mfu": flops / top if top else 0.0,
        "peak_memory_bytes": float(peak(device)),
    }


def _peak_flops(device: str, half: bool) -> float:
    """Of the devices whose data sheets we know, dense; elsewhere 0: unknown."""
    if device != "cuda":
        return 0.0
    name = torch.cuda.get_device_name()
    known = {"H100": (989e12, 67e12), "H200": (989e12, 67e12), "A100": (312e12, 19.5e12)}
    return next((peaks[0 if half else 1] for key, peaks in known.items() if key in name), 0.0)
