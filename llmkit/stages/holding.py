"""How a training stage holds its model, what is beside it, and what a forward keeps."""

from __future__ import annotations

from math import prod

from llmkit.build.precision import Types, types
from llmkit.core.shape import Cost, Shape
from llmkit.models.logps import BLOCK
from llmkit.models.logps_trained import CHUNK_BYTES
from llmkit.models.node import Nf4, NoQuant
from llmkit.models.safe import NUMBERED
from llmkit.plan.account import (
    CUDA_HALF,
    CUDA_MIXED,
    CUDA_MIXED_LORA,
    DORA,
    DROPPED,
    FUSED,
    HALF,
    HALF_LORA,
    MIXED,
    QUANTISED,
    Held,
    Kept,
)
from llmkit.stages.companions import companions, drawing, plain_bytes
from llmkit.stages.training import Training

BASE = {"cpu": 96 << 20, "cuda": 1 << 30}
"""Bytes that libraries take with the first step: code and buffers (benchmarks/plan_grid.py); on
a GPU the context and the libraries of products and collectives."""


def held_by(node: Training, shape: Shape, device: str, world: int = 1, free: int = 0) -> Held:
    """How a run holds things on one of `world` ranks, of which each has `free` bytes."""
    kinds, cost, frozen = types(node.types_name, device), node.cost(shape), node.adapter.frozen_base
    short, plain = 2.0 if kinds.half else 4.0, plain_bytes(node, device)
    trained = 4.0 if frozen or not node.writes else plain  # what torch's optimizers hold is of the type of the weights
    early = node.memory.optimizer_in_backward
    largest = max(map(prod, shape.tensors.values()), default=0)
    return Held(
        weight_bytes=node.quant.weight_bytes or plain,
        plain_bytes=plain,
        kept=_kept(node, cost, kinds, device).times(node.trunks),
        cost=cost,
        moment_bytes=min(_moments(node, shape, cost), 2 * trained),
        trained_bytes=trained,
        recompute=0,
        head_bytes=_head(cost.head, device, 6 * shape.vocab * shape.hidden if kinds.half else 0),
        head_gradient=4 * shape.vocab * shape.hidden if cost.head else 0,
        gradients=min(largest, cost.trained) if early else None,
        offload=node.memory.offload_activations,
        short=short,
        copies=short if kinds.mixed and plain == 4.0 and not node.quant.weight_bytes else 0.0,
        base=BASE[device],
        by_layer=_by_layer(node, shape, kinds, device),
        updating=4 * getattr(node.optim, "working", 0) * (largest if cost.trained >= shape.params else 0),
        copied=device == "cpu" and node.checkpoint.background,
        saves=node.checkpoint.every is not None or node.checkpoint.per_epoch is not None,
        exports=device == "cpu",
        beside=companions(node, shape, device, world, free),
        drawing=drawing(node, shape, device, world, short),
    )


def _by_layer(node: Training, shape: Shape, kinds: Types, device: str) -> bool:
    """Whether a model that is cut is read by layers (models/unread.py). Experts that are put together of weights of
    their own wait on the host, which a CPU's ranks compute on."""
    experts = any(len(NUMBERED.findall(name)) > 1 for name in shape.tensors)
    plain = isinstance(node.quant, NoQuant | Nf4) and kinds.compute != "fp8"
    return plain and node.adapter.blind() and not (experts and device == "cpu")


def _moments(node: Training, shape: Shape, cost: Cost) -> float:
    """Bytes of the optimizer's state for each trained parameter."""
    if node.adapter.frozen_base:
        return node.optim.moments(1, 0, max(1, cost.low))
    inner = shape.params - shape.embedded
    return node.optim.moments(inner, shape.embedded, shape.hidden) / max(1, shape.params)


def _kept(node: Training, cost: Cost, kinds: Types, device: str) -> Kept:
    plain = isinstance(node.quant, NoQuant)
    if any(cost.own):
        hidden, inner, keys = cost.own
        size = 3 if kinds.half else 4  # some of it is in 16 bits, some is not
        return Kept(size * hidden, size * (inner if plain else inner + 1), size * keys)
    if kinds.half:
        if device == "cuda" and plain and not node.adapter.frozen_base:
            return CUDA_MIXED if kinds.mixed else CUDA_HALF
        if device == "cuda" and plain and kinds.mixed and cost.low and cost.keeps == "shared":
            return CUDA_MIXED_LORA
        if kinds.mixed:
            return MIXED
        return HALF_LORA if node.adapter.frozen_base else HALF
    if cost.keeps != "shared":
        return {"scaled": DORA, "input": DROPPED}[cost.keeps]
    return FUSED if plain else QUANTISED


def _head(trained: bool, device: str, product: int) -> int:
    """A block of logits with its chances; of a trained head a chunk. On a GPU in 16 bits a chunk's chances are rounded
    beside it, and so is the `product` that is added to the gradient."""
    if trained:
        return CHUNK_BYTES[device] if device == "cpu" else CHUNK_BYTES[device] * 3 // 2 + product
    positions, words = BLOCK[device]
    return 2 * 4 * positions * words
