"""What a training stage needs, and what its `auto`s come to."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from llmkit.adapters.limits import virtual_tokens
from llmkit.build.precision import Types, types
from llmkit.core.errors import ModelError, RecipeError, ResourceError
from llmkit.core.memory import available
from llmkit.core.ranks import Ranks
from llmkit.core.shape import Cost, Shape
from llmkit.models.logps import BLOCK
from llmkit.models.logps_trained import CHUNK_BYTES
from llmkit.models.node import ModelRef, Nf4, NoQuant
from llmkit.models.outline import stored
from llmkit.models.resolve import Resolved, resolve
from llmkit.models.safe import NUMBERED, read_json
from llmkit.parallel.node import Auto, Fsdp
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
    Choice,
    Held,
    Kept,
    choose,
)
from llmkit.plan.shares import shares
from llmkit.stages.degrees import check_degrees
from llmkit.stages.training import Training

BASE = {"cpu": 96 << 20, "cuda": 1 << 30}
"""Bytes that libraries take with the first step: code and buffers (benchmarks/plan_grid.py); on
a GPU the context and the libraries of products and collectives."""
KNOB = "lower micro_batch or data.max_length, or set memory.recompute=full"

CUT = "use adapter none, or lora with init default, no dora and no modules_to_save: those are read a layer at a time"


def whole_model(ref: ModelRef) -> Resolved:
    """The files of a model that can be trained.

    Raises:
        ModelError: there are none, or they are an adapter's.
    """
    resolved = resolve(ref)
    if resolved.base is not None:
        what = f"{ref.name} is an adapter; training goes on from a whole model"
        raise ModelError(what, fix="merge it first", key="model")
    return resolved


def sizes(node: Training, resolved: Resolved, device: str, ranks: Ranks = Ranks()) -> tuple[Shape, Choice]:
    """The memory account of a stage on one of `ranks`, and what `auto` comes to.

    Raises:
        ResourceError: it cannot fit.
        RecipeError: the model's heads or experts do not go with the degrees of `parallel`.
    """
    check_degrees(read_json(resolved.folder / "config.json"), node.parallel)
    shape = stored(resolved.folder)
    free = available(device) // (ranks.here if device == "cpu" else 1)  # ranks of a host share its memory
    choice = chosen(node, shape, device, free, ranks.world)
    made = choice.account
    if not choice.fits and made.load > max(made.total, made.save):
        what = f"reading the model whole takes about {made.load / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
        raise ResourceError(what, fix=CUT, key="parallel")
    if not choice.fits:
        need, there = choice.account.peak / 2**20, free / 2**20
        where = f" on each of {ranks.world} ranks" if ranks.world > 1 else ""
        what = f"training needs about {need:.0f} MiB{where}, {there:.0f} MiB are free"
        raise ResourceError(what, fix=KNOB, key="micro_batch")
    return shape, choice


def chosen(node: Training, shape: Shape, device: str, free: int, world: int) -> Choice:
    """What `auto` comes to on one of `world` ranks, of which each has `free` bytes."""
    first, *others = [_chosen(tried, shape, device, free, world) for tried in strategies(node, world)]
    return next((choice for choice in (first, *others) if choice.fits), first)


def strategies(node: Training, world: int) -> list[Training]:
    """The stage with each strategy that `auto` may come to: copies where they fit, else parts."""
    parallel = node.parallel
    kind = parallel.resolve(world)
    first = replace(node, parallel=replace(parallel, strategy=kind))
    settled = not isinstance(parallel.strategy, Auto) or node.deterministic
    if settled or world == 1 or kind.kind != "ddp":
        return [first]
    try:
        return [first, replace(node, parallel=replace(parallel, strategy=Fsdp(), replicate="auto"))]
    except RecipeError:  # what the recipe asks for cannot be cut
        return [first]


def _chosen(node: Training, shape: Shape, device: str, free: int, world: int) -> Choice:
    degrees, rows = node.parallel.degrees(world), node.micro_batch if isinstance(node.micro_batch, int) else None
    share = -(-node.batch.examples // degrees.data)
    if node.whole_step and (degrees.data > 1 or (node.deterministic and world > 1)):
        what = f"it compares all pairs of a step, and {degrees.data} ranks would see a part each"
        raise RecipeError(what, fix="run one process, or use another loss", key="loss.kind")
    if node.memory.optimizer_in_backward or node.whole_step:
        rows = rows or share  # a step is one micro-batch
    wanted = {"auto": None, "none": 0, "selective": 2, "full": 1}[node.memory.recompute]
    if node.adapter.limits.recompute:
        wanted = 0
    cut = shares(node.parallel.resolve(world), degrees)
    held = held_by(node, shape, device, world)
    length = node.row_tokens + virtual_tokens(node.adapter)
    if node.parallel.shards(world, node.deterministic):  # the same sizes for any number of ranks
        share = max(1, node.batch.examples // node.parallel.virtual)
    most = share if node.batch.tokens is None else None
    made = choose(shape, held, length, free, device, rows, wanted, most, cut)
    return replace(made, strategy=node.parallel.resolve(world).kind)


def held_by(node: Training, shape: Shape, device: str, world: int = 1) -> Held:
    """How a run of so many ranks holds things."""
    kinds, cost, frozen = types(node.types_name, device), node.cost(shape), node.adapter.frozen_base
    short = 2.0 if kinds.half else 4.0
    plain = short if kinds.params == "bf16" or (kinds.mixed and frozen and device == "cuda") else 4.0
    trained = 4.0 if frozen or not node.writes else plain  # what torch's optimizers hold is of the type of the weights
    early = node.memory.optimizer_in_backward
    layers = node.quant.weight_bytes or plain
    copy = (shape.params - shape.embedded) * layers + shape.embedded * plain
    largest = max(map(prod, shape.tensors.values()), default=0)
    return Held(
        weight_bytes=layers,
        plain_bytes=plain,
        kept=_kept(node, cost, kinds, device),
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
        beside=int(node.models_beside * shape.params * plain + node.copies(world) * copy),
        by_layer=_by_layer(node, shape, kinds, device),
        updating=4 * getattr(node.optim, "working", 0) * (largest if cost.trained >= shape.params else 0),
        copied=device == "cpu" and node.checkpoint.background,
        saves=node.checkpoint.every is not None or node.checkpoint.per_epoch is not None,
        exports=device == "cpu",
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
