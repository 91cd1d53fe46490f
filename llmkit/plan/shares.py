"""What of a run lies on one rank, by strategy and degrees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from llmkit.core.shape import Shape
from llmkit.parallel.degrees import Degrees
from llmkit.parallel.fits import stages_of
from llmkit.parallel.zero_config import BUCKET as ELEMENTS
from llmkit.parallel.zero_config import LIVE

BUCKET = 25 << 20
"""Bytes of gradients that replicas sum at a time (torch's `bucket_cap_mb`)."""


@dataclass(frozen=True)
class Shares:
    """Into how many parts each thing is cut, of which a rank has one."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    tensor: int = 1
    """Parts of what is inside a layer, its weights too."""
    between: int = 1
    """Parts of what lies between the products of a layer: as many as `tensor` where its norms are spread too."""
    context: int = 1
    """Parts of a row's tokens."""
    pipeline: int = 1
    """Parts of the layers."""
    expert: int = 1
    """Parts of the experts of each layer."""
    gathered: int = 0
    """Layers that are whole at one time, of those that are cut."""
    bucket: float = 0.0
    """Bytes that are on their way at most; 0 for none."""
    elements: float = 0.0
    """Parameters that are on their way at most, in the size of a gradient each."""
    live: float = 0.0
    """Parameters that are whole at one time at most, where that is said so and not in layers."""
    master: float = 0.0
    """Bytes of a copy of each trained weight beside the optimizer's state."""
    copies: int = 1
    """Ranks that hold the same, and share the writing of it."""
    away: tuple[str, ...] = ()
    """What waits on the host: weights, gradients, optimizer."""
    whole_gradients: bool = False
    """Gradients are cut only after the last micro-batch."""

    def stage(self, shape: Shape) -> float:
        """The share of the layers in the stage that has most of them.

        Raises:
            RecipeError: there are more stages than layers.
        """
        return self._largest(shape)[0]

    def slowest(self, shape: Shape) -> float:
        """The share of the products, the head's among them, of the stage that has most of them."""
        return self._largest(shape)[1]

    def _largest(self, shape: Shape) -> tuple[float, float]:
        if self.pipeline == 1 or not shape.layers:
            return 1.0, 1.0
        each = (shape.params - shape.embedded) // shape.layers
        return _largest(shape.layers, each, shape.vocab * shape.hidden, self.pipeline)


@cache
def _largest(layers: int, each: int, tail: int, stages: int) -> tuple[float, float]:
    homes = stages_of([each] * layers, tail, stages)
    counts = [homes.count(stage) for stage in range(stages)]
    work = [each * count + (tail if stage == stages - 1 else 0) for stage, count in enumerate(counts)]
    return max(counts) / layers, max(work) / sum(work)


ALONE = Shares()


def shares(strategy: Any, degrees: Degrees) -> Shares:
    """What a strategy (a node of `parallel`) and its degrees leave on a rank."""
    inner: dict[str, Any] = {"tensor": degrees.tensor, "context": degrees.context, "pipeline": degrees.pipeline}
    inner["expert"] = degrees.expert
    return _WAYS[strategy.kind](strategy, degrees, inner)


def _replica(strategy: Any, degrees: Degrees, inner: dict[str, Any]) -> Shares:
    copies = degrees.data * degrees.context
    return Shares(**inner, copies=copies, bucket=BUCKET if copies > 1 else 0.0)


def _fsdp(strategy: Any, degrees: Degrees, inner: dict[str, Any]) -> Shares:
    """Each layer is gathered while the one before it computes, and given up after it; or all stay. Ranks that share
    rows hold parameters together too."""
    n = degrees.shard * degrees.context
    away = ("weights", "gradients", "optimizer") if strategy.offload == "cpu" else ()
    return Shares(
        n,
        n,
        n,
        **inner,
        copies=degrees.replicate,
        gathered=(2 if strategy.reshard else 1000) if n > 1 else 0,
        away=away,
    )


def _zero(strategy: Any, degrees: Degrees, inner: dict[str, Any]) -> Shares:
    """Stage 1 cuts the optimizer's state, 2 the gradients too, 3 the weights too."""
    n, stage = degrees.shard, strategy.stage
    places = {"optimizer": strategy.offload.optimizer, "weights": strategy.offload.params}
    away = [part for part, where in places.items() if where != "none"]
    away += ["gradients"] if "optimizer" in away and stage > 1 else []
    return Shares(
        n if stage > 2 else 1,
        n if stage > 1 else 1,
        n,
        **inner,
        gathered=2 if stage > 2 and n > 1 else 0,
        elements=ELEMENTS if n > 1 else 0.0,
        live=LIVE if stage > 2 and n > 1 else 0.0,
        master=4.0,
        away=tuple(away),
    )


_WAYS: dict[str, Callable[[Any, Degrees, dict[str, Any]], Shares]] = {
    "single": _replica,
    "ddp": _replica,
    "fsdp": _fsdp,
    "zero": _zero,
}
