"""What a stage's other models and caches take of a rank's memory."""

from __future__ import annotations

from llmkit.adapters.node import Adapter
from llmkit.build.precision import reading, types
from llmkit.core.errors import told_below
from llmkit.core.shape import Shape
from llmkit.inference.cache import Cache
from llmkit.inference.scheduler import GPU_TOKENS, Limits
from llmkit.models.node import ModelRef, NoQuant, Quant
from llmkit.models.outline import outline, stored
from llmkit.models.resolve import resolve
from llmkit.plan.beside import Beside, Round, token_bytes
from llmkit.stages.training import Training


def companions(node: Training, shape: Shape, device: str, world: int, free: int) -> dict[str, int]:
    """Bytes of each that stays as it is on one of `world` ranks, by what it is for; `free` is what a cache of no said
    size takes a share of.

    Raises:
        ModelError: a model cannot be had.
    """
    found: dict[str, int] = {}
    for one in node.beside(world):
        if one.learns:
            continue
        taken = held_of(node, one, shape, device)
        taken += cached(node, one, one.cache, shape, device, free) if one.cache is not None else 0
        found[one.role] = found.get(one.role, 0) + int(taken)
    if (draws := node.draws(world)) is not None and not draws.aside:
        found["cache"] = cache_of(node, draws, world, shape, device)
    return found


def cache_of(node: Training, draws: Round, world: int, shape: Shape, device: str) -> int:
    """Bytes of keys and values of the answers that one of those who draw makes at once."""
    most = draws.room(world) * token_bytes(shape, draws.cache, short_bytes(node, device))
    return int(min(most, draws.cache.size or most))


def held_of(node: Training, one: Beside, shape: Shape, device: str) -> float:
    """Bytes of a model with the adapter on it."""
    own, quant = shape_of(one, node, shape)
    plain = _plain(node, one, device)
    size = (own.params - own.embedded) * (quant.weight_bytes or plain) + own.embedded * plain
    if one.adapter is None:
        return size
    cost, whole = one.adapter.cost(own), not one.adapter.frozen_base
    return size if whole else size + 4 * (cost.trained + cost.more)


def cached(node: Training, one: Beside, cache: Cache, shape: Shape, device: str, free: int) -> float:
    """Bytes of what it keeps of the texts that it reads and writes."""
    budget = cache.budget(device, free)
    if one.room is None:
        return budget
    own, _ = shape_of(one, node, shape)
    return min(budget, one.room * token_bytes(own, cache, _plain(node, one, device)))


def _plain(node: Training, one: Beside, device: str) -> float:
    """Bytes of each of its weights that is not quantised."""
    kinds = types(node.types_name, device)
    if one.how == "asked":
        return 2.0 if reading("auto", device).half else 4.0
    if one.how == "frozen":
        return 2.0 if kinds.params == "bf16" or (kinds.mixed and device == "cuda") else 4.0
    return plain_bytes(node, node.adapter, device)


def shape_of(one: Beside, node: Training, shape: Shape) -> tuple[Shape, Quant]:
    """The shape of a model, and how it is held.

    Raises:
        ModelError: it cannot be had.
    """
    if one.model is None:
        return shape, one.quant or node.quant
    with told_below(one.key, "model"):
        return seen(one.model, one.quant or (node.quant if one.how == "trained" else None))


def seen(ref: ModelRef, quant: Quant | None) -> tuple[Shape, Quant]:
    """A model by its name; of public ones nothing is fetched.

    Raises:
        ModelError: there is none.
    """
    if (own := outline(ref)) is not None:
        return own, quant or NoQuant()
    resolved = resolve(ref)
    return stored((resolved.base or resolved).folder), quant or resolved.quant


def drawing(node: Training, shape: Shape, device: str, world: int) -> int:
    """Bytes that a forward of the engine takes on a rank that trains and draws."""
    draws = node.draws(world)
    return 0 if draws is None or draws.aside else forward_of(node, draws, world, shape, device)


def forward_of(node: Training, draws: Round, world: int, shape: Shape, device: str) -> int:
    """Bytes that a forward of the engine takes: what a layer makes of its tokens, and the laws of all answers."""
    at_once = min(draws.sequences, draws.answers(world))
    tokens = max(at_once, draws.tokens or (Limits.tokens if device == "cpu" else GPU_TOKENS))
    layer = (6 * shape.hidden + 3 * shape.intermediate + 2 * shape.keys) * short_bytes(node, device)
    return int(tokens * layer + LAWS * 4 * at_once * shape.vocab)


LAWS = 3
"""Of each answer's next token, that drawing one holds at a time."""


def short_bytes(node: Training, device: str) -> float:
    """Of a number in a product."""
    return 2.0 if types(node.types_name, device).half else 4.0


def plain_bytes(node: Training, adapter: Adapter, device: str) -> float:
    """Of a weight that is not quantised, of a model with this adapter: a frozen base under autocast is held in 16 bits
    already, on a GPU."""
    kinds = types(node.types_name, device)
    frozen = kinds.mixed and adapter.frozen_base and device == "cuda"
    return short_bytes(node, device) if kinds.params == "bf16" or frozen else 4.0
