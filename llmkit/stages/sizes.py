"""What a training stage needs, and what its `auto`s come to."""

from __future__ import annotations

from dataclasses import replace

from llmkit.adapters.limits import virtual_tokens
from llmkit.core.errors import ModelError, RecipeError, ResourceError
from llmkit.core.memory import available
from llmkit.core.ranks import Ranks
from llmkit.core.shape import Shape
from llmkit.models.node import ModelRef
from llmkit.models.outline import stored
from llmkit.models.resolve import Resolved, resolve
from llmkit.models.safe import read_json
from llmkit.parallel.node import Auto, Fsdp
from llmkit.plan.choice import Choice, choose
from llmkit.plan.shares import shares
from llmkit.stages.degrees import check_degrees
from llmkit.stages.holding import held_by
from llmkit.stages.training import Training

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
    free = room(device, ranks)
    choice = chosen(node, shape, device, free, ranks.world)
    made = choice.account
    if not choice.fits and made.load > max(made.total, made.save):
        what = f"reading the model whole takes about {made.load / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
        raise ResourceError(what, fix=CUT, key="parallel")
    if not choice.fits:
        need, there = choice.account.peak / 2**20, free / 2**20
        where = f" on each of {ranks.world} ranks" if ranks.world > 1 else ""
        what = f"training needs about {need:.0f} MiB{where}, {there:.0f} MiB are free"
        raise ResourceError(what, fix=node.knob, key="micro_batch")
    return shape, choice


def room(device: str, ranks: Ranks) -> int:
    """Bytes that are free for one of these: ranks of a host share its memory."""
    return available(device) // (ranks.here if device == "cpu" else 1)


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
    share = -(-node.step_examples // degrees.data)
    if node.whole_step and (degrees.data > 1 or (node.deterministic and world > 1)):
        what = f"it compares all pairs of a step, and {degrees.data} ranks would see a part each"
        raise RecipeError(what, fix="run one process, or use another loss", key="loss.kind")
    if node.memory.optimizer_in_backward or node.whole_step:
        rows = rows or share  # a step is one micro-batch
    wanted = {"auto": None, "none": 0, "selective": 2, "full": 1}[node.memory.recompute]
    if node.adapter.limits.recompute:
        wanted = 0
    cut = shares(node.parallel.resolve(world), degrees)
    held = held_by(node, shape, device, world, free)
    length = node.row_tokens + virtual_tokens(node.adapter)
    if node.parallel.shards(world, node.deterministic):  # the same sizes for any number of ranks
        share = max(1, node.step_examples // node.parallel.virtual)
    most = share if node.batch.tokens is None else None
    made = choose(shape, held, length, free, device, rows, wanted, most, cut)
    return replace(made, strategy=node.parallel.resolve(world).kind)
