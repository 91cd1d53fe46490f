"""What a training stage needs of its device and of other packages, asked before any heavy work."""

from __future__ import annotations

import torch

from llmkit.build import float8
from llmkit.core.errors import ResourceError
from llmkit.stages.training import Training


def check_needs(node: Training, device: str) -> None:
    """Sees to it that what the recipe asks for can be done on `device`.

    Raises:
        ResourceError: it cannot.
        ModelError: a package is missing.
    """
    wanted = node.optim.device
    if wanted and wanted != device:
        raise ResourceError(
            f"{node.optim.kind} needs a {wanted} device, and this run is on a {device}",
            fix="set optim.kind=adamw_8bit",
            key="optim.kind",
        )
    if node.memory.offload_activations and device == "cpu":
        raise ResourceError(
            "there is no device to move activations from: the host's memory is the device's",
            fix="set memory.recompute=selective or full instead",
            key="memory.offload_activations",
        )
    node.optim.ready()
    if node.types_name == "fp8":
        float8.check(device, torch.cuda.get_device_capability() if device == "cuda" else (0, 0))
