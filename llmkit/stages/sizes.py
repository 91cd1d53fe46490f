"""What a training stage needs, and what its `auto`s come to."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from llmkit.adapters.limits import virtual_tokens
from llmkit.build.precision import Types, types
from llmkit.core.errors import ModelError, ResourceError
from llmkit.core.memory import available
from llmkit.core.shape import Cost, Shape
from llmkit.models.logps import BLOCK
from llmkit.models.logps_trained import CHUNK_BYTES
from llmkit.models.node import ModelRef, NoQuant
from llmkit.models.resolve import Resolved, resolve
from llmkit.models.safe import check_folder, read_json
from llmkit.parallel.fits import check_tensor
from llmkit.plan.account import DORA, DROPPED, FUSED, HALF, HALF_LORA, QUANTISED, Choice, Held, Kept, choose
from llmkit.stages.training import Training

KNOB = "lower micro_batch or data.max_length, or set memory.recompute=full"


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


def sizes(node: Training, resolved: Resolved, device: str) -> tuple[Shape, Choice]:
    """The memory account of a stage, and what `auto` comes to.

    Raises:
        ResourceError: it cannot fit.
        RecipeError: the model cannot be dealt out to `parallel.tensor` ranks.
    """
    headers = check_folder(resolved.folder)
    tensors = {name: item["shape"] for header in headers.values() for name, item in header.items()}
    said = read_json(resolved.folder / "config.json")
    shape = Shape.read(said, tensors)
    if node.parallel.tensor > 1:
        check_tensor(said, node.parallel.tensor)
    kinds = types(node.types_name, device)
    rows = node.micro_batch if isinstance(node.micro_batch, int) else None
    if node.memory.optimizer_in_backward:
        rows = rows or node.batch.rows  # a step is one micro-batch
    wanted = {"auto": None, "none": 0, "selective": 2, "full": 1}[node.memory.recompute]
    if node.adapter.limits.recompute:
        wanted = 0
    free, held = available(device), _held(node, shape, kinds, device)
    if node.memory.optimizer_in_backward:
        largest = max(prod(size) for size in tensors.values())
        held = replace(held, gradients=min(largest, held.cost.trained))
    length = -(-node.data.max_length // node.parallel.context) + virtual_tokens(node.adapter)
    most = node.batch.rows if node.batch.tokens is None else None
    if most and node.deterministic:  # the same sizes for any number of ranks
        most = max(1, most // node.parallel.virtual)
    choice = choose(shape, held, length, free, device, rows, wanted, most)
    if not choice.fits:
        need, there = choice.account.total / 2**20, free / 2**20
        raise ResourceError(
            f"training needs about {need:.0f} MiB, {there:.0f} MiB are free", fix=KNOB, key="micro_batch"
        )
    return shape, choice


def _held(node: Training, shape: Shape, kinds: Types, device: str) -> Held:
    cost = node.adapter.cost(shape)
    plain = 2.0 if kinds.params == "bf16" else 4.0
    copies = 2.0 if kinds.mixed and device == "cpu" else 0.0  # autocast keeps what it made of fp32 weights
    return Held(
        weight_bytes=(node.quant.weight_bytes or plain) + copies,
        plain_bytes=plain,
        kept=_kept(node, cost, kinds),
        cost=cost,
        moment_bytes=_moments(node, shape, cost),
        recompute=0,
        head_bytes=_head(shape, cost.head, device),
        offload=node.memory.offload_activations,
    )


def _moments(node: Training, shape: Shape, cost: Cost) -> float:
    """Bytes of the optimizer's state for each trained parameter."""
    if node.adapter.frozen_base:
        return node.optim.moments(1, 0, max(1, cost.low))
    inner = shape.params - shape.embedded
    return node.optim.moments(inner, shape.embedded, shape.hidden) / max(1, shape.params)


def _kept(node: Training, cost: Cost, kinds: Types) -> Kept:
    plain = isinstance(node.quant, NoQuant)
    if any(cost.own):
        hidden, inner, keys = cost.own
        size = 3 if kinds.half else 4  # some of it is in 16 bits, some is not
        return Kept(size * hidden, size * (inner if plain else inner + 1), size * keys)
    if kinds.half:
        return HALF_LORA if node.adapter.frozen_base and not kinds.mixed else HALF
    if cost.keeps != "shared":
        return {"scaled": DORA, "input": DROPPED}[cost.keeps]
    return FUSED if plain else QUANTISED


def _head(shape: Shape, trained: bool, device: str) -> int:
    """A block of logits with its chances; of a trained head a chunk, and twice the gradient of its weight."""
    if not trained:
        positions, words = BLOCK[device]
        return 2 * 4 * positions * words
    return 2 * CHUNK_BYTES[device] + 2 * 4 * shape.vocab * shape.hidden
