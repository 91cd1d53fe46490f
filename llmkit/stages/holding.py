"""How a training stage holds its model, what is beside it, and what a forward keeps."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from llmkit.adapters.node import Adapter
from llmkit.build.precision import Types, types
from llmkit.core.shape import Cost, Shape
from llmkit.models.classified import HEADS
from llmkit.models.logps import BLOCK
from llmkit.models.logps_trained import CHUNK_BYTES
from llmkit.models.node import Nf4, NoQuant, Quant
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
    Trunk,
)
from llmkit.plan.beside import Beside
from llmkit.stages.companions import companions, drawing, plain_bytes, shape_of
from llmkit.stages.training import Training

BASE = {"cpu": 96 << 20, "cuda": 1 << 30}
"""Bytes that libraries take with the first step: code and buffers (benchmarks/plan_grid.py); on
a GPU the context and the libraries of products and collectives."""


def held_by(node: Training, shape: Shape, device: str, world: int = 1, free: int = 0) -> Held:
    """How a run holds things on one of `world` ranks, of which each has `free` bytes."""
    kinds, cost = types(node.types_name, device), node.cost(shape)
    made = _model(node, node.adapter, node.quant, cost, shape, device)
    largest = max(map(prod, shape.tensors.values()), default=0)
    return replace(
        made,
        head_bytes=_head(cost.head, device, shape.vocab, 6 * shape.vocab * shape.hidden if kinds.half else 0),
        head_gradient=4 * shape.vocab * shape.hidden if cost.head else 0,
        offload=node.memory.offload_activations,
        base=BASE[device],
        by_layer=_by_layer(node, shape, kinds, device),
        updating=4 * getattr(node.optim, "working", 0) * (largest if cost.trained >= shape.params else 0),
        saves=node.checkpoint.every is not None or node.checkpoint.per_epoch is not None,
        exports=device == "cpu",
        beside=companions(node, shape, device, world, free),
        drawing=drawing(node, shape, device, world),
        trunks=tuple(_trunk(node, one, shape, device) for one in node.beside(world) if one.learns),
    )


def _model(node: Training, adapter: Adapter, quant: Quant, cost: Cost, shape: Shape, device: str) -> Held:
    """What is held of a model that a stage trains by this adapter."""
    kinds, plain = types(node.types_name, device), plain_bytes(node, adapter, device)
    short = 2.0 if kinds.half else 4.0
    # what torch's optimizers hold is of the type of the weights
    trained = 4.0 if adapter.frozen_base or not node.writes else plain
    largest = max(map(prod, shape.tensors.values()), default=0)
    return Held(
        weight_bytes=quant.weight_bytes or plain,
        plain_bytes=plain,
        kept=_kept(adapter, quant, cost, kinds, device),
        cost=cost,
        moment_bytes=min(_moments(node, adapter, shape, cost), 2 * trained),
        trained_bytes=trained,
        recompute=0,
        head_bytes=0,
        gradients=min(largest, cost.trained) if node.memory.optimizer_in_backward else None,
        short=short,
        copies=short if kinds.mixed and plain == 4.0 and not quant.weight_bytes else 0.0,
        copied=device == "cpu" and node.checkpoint.background,
    )


def _trunk(node: Training, one: Beside, shape: Shape, device: str) -> Trunk:
    """A model that is trained beside, by an adapter of its own, whose states a head of one number reads."""
    own, quant = shape_of(one, node, shape)
    if one.adapter is None:
        raise TypeError("nothing is trained of it")
    bare = _bare(own)
    cost = one.adapter.cost(bare)
    more = cost.more + own.hidden + (cost.trained if one.adapter.frozen_base else 0)  # beside the base
    idle = (own.params - bare.params) * plain_bytes(node, one.adapter, device) / 4
    cost = replace(cost, trained=cost.trained + own.hidden, more=more + int(0 if one.over else idle), head=False)
    held = replace(_model(node, one.adapter, quant, cost, bare, device), by_layer=False)
    return Trunk(one.role, bare, held, one.over)


def _bare(shape: Shape) -> Shape:
    """A model whose own head is not read: that of its vocabulary is none of its embeddings, where it is not tied."""
    head = shape.vocab * shape.hidden if shape.embedded > shape.vocab * shape.hidden else 0
    idle = ("lm_head", *HEADS)
    tensors = {name: size for name, size in shape.tensors.items() if name.partition(".")[0] not in idle}
    return replace(shape, params=shape.params - head, embedded=shape.embedded - head, tensors=tensors)


def _by_layer(node: Training, shape: Shape, kinds: Types, device: str) -> bool:
    """Whether a model that is cut is read by layers (models/unread.py). Experts that are put together of weights of
    their own wait on the host, which a CPU's ranks compute on."""
    experts = any(len(NUMBERED.findall(name)) > 1 for name in shape.tensors)
    plain = isinstance(node.quant, NoQuant | Nf4) and kinds.compute != "fp8"
    return plain and node.blind() and not (experts and device == "cpu")


def _moments(node: Training, adapter: Adapter, shape: Shape, cost: Cost) -> float:
    """Bytes of the optimizer's state for each trained parameter."""
    if adapter.frozen_base:
        return node.optim.moments(1, 0, max(1, cost.low))
    inner = shape.params - shape.embedded
    return node.optim.moments(inner, shape.embedded, shape.hidden) / max(1, shape.params)


def _kept(adapter: Adapter, quant: Quant, cost: Cost, kinds: Types, device: str) -> Kept:
    plain = isinstance(quant, NoQuant)
    if any(cost.own):
        hidden, inner, keys = cost.own
        size = 3 if kinds.half else 4  # some of it is in 16 bits, some is not
        return Kept(size * hidden, size * (inner if plain else inner + 1), size * keys)
    if kinds.half:
        if device == "cuda" and plain and not adapter.frozen_base:
            return CUDA_MIXED if kinds.mixed else CUDA_HALF
        if device == "cuda" and plain and kinds.mixed and cost.low and cost.keeps == "shared":
            return CUDA_MIXED_LORA
        if kinds.mixed:
            return MIXED
        return HALF_LORA if adapter.frozen_base else HALF
    if cost.keeps != "shared":
        return {"scaled": DORA, "input": DROPPED}[cost.keeps]
    return FUSED if plain else QUANTISED


def _head(trained: bool, device: str, vocab: int, product: int) -> int:
    """A block of logits with its chances; of a trained head a chunk. On a GPU in 16 bits a chunk's chances are rounded
    beside it, and so is the `product` that is added to the gradient."""
    if trained:
        return CHUNK_BYTES[device] if device == "cpu" else CHUNK_BYTES[device] * 3 // 2 + product
    positions, words = BLOCK[device]
    return 2 * 4 * positions * min(words, vocab)
