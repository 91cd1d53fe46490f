"""What a training stage needs of its device and of other packages, asked before any heavy work."""

from __future__ import annotations

from pathlib import Path

import torch

from llmkit.build import float8
from llmkit.checkpoint.mirror import opened
from llmkit.core.errors import LlmkitError, ModelError, Problem, ResourceError
from llmkit.models.here import config_here
from llmkit.models.kinds import missing
from llmkit.parallel.node import Zero
from llmkit.stages.degrees import check_degrees
from llmkit.stages.training import Training


def check_needs(node: Training, device: str) -> None:
    """Sees to it that what the recipe asks for can be done on `device`; all that cannot is told at once.

    Raises:
        ResourceError: it cannot.
        ModelError: a package is missing.
    """
    found: list[LlmkitError] = []
    for check in (_optimizer, _offload, _attention, _precision, _degrees, _mirror, _strategy):
        try:
            check(node, device)
        except LlmkitError as cause:
            found.append(cause)
    if found:
        problems: list[Problem] = [problem for cause in found for problem in cause.problems]
        raise type(found[0])(problems=problems)


def _optimizer(node: Training, device: str) -> None:
    wanted = node.optim.device
    if wanted and wanted != device:
        raise ResourceError(
            f"{node.optim.kind} needs a {wanted} device, and this run is on a {device}",
            fix="set optim.kind=adamw_8bit",
            key="optim.kind",
        )
    node.optim.ready()


def _strategy(node: Training, device: str) -> None:
    if isinstance(node.parallel.strategy, Zero):
        node.parallel.strategy.ready(device)


def _offload(node: Training, device: str) -> None:
    if node.memory.offload_activations and device == "cpu":
        raise ResourceError(
            "there is no device to move activations from: the host's memory is the device's",
            fix="set memory.recompute=selective or full instead",
            key="memory.offload_activations",
        )


def _attention(node: Training, device: str) -> None:
    kind = node.model.attention
    if why := missing(kind, device == "cuda"):
        fix = "set model.attention=auto"
        raise ModelError(
            f"{kind} {why}",
            fix=f"pip install flash-attn, or {fix}" if device == "cuda" else fix,
            key="model.attention",
        )


def _degrees(node: Training, _: str) -> None:
    """Of a model that is here already; of another it is asked when it has come."""
    if (said := config_here(node.model)) is not None:
        check_degrees(said, node.parallel)


def _mirror(node: Training, device: str) -> None:
    if node.checkpoint.mirror is not None:
        opened(node.checkpoint.mirror, Path(node.out) / "checkpoints")


def _precision(node: Training, device: str) -> None:
    if node.types_name == "fp8":
        float8.check(device, torch.cuda.get_device_capability() if device == "cuda" else (0, 0))
