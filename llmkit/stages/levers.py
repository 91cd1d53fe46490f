"""What contradicts what among optimizer, precision and memory, and what of them a device must have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmkit.core.config import Conflict
from llmkit.core.errors import RecipeError
from llmkit.parallel.node import Zero
from llmkit.train.optim import ELEMENTWISE
from llmkit.train.schedule import Constant

if TYPE_CHECKING:
    from llmkit.stages.training import Training


def contradictions(node: Training) -> Iterator[Conflict]:
    """The rules over several fields."""
    if node.optim.constant and not isinstance(node.schedule, Constant):
        what = f"{node.optim.kind} averages the weights in place of lowering the rate"
        yield Conflict("schedule.kind", what, "set schedule: {kind: constant, warmup: 0.03}", "optim.kind")
    if node.types_name == "fp8" and node.adapter.frozen_base:
        what = "fp8 multiplies with weights that are trained, and an adapter freezes them"
        yield Conflict("precision", what, "use bf16_mixed, or adapter: none", "adapter.kind")
    if node.memory.optimizer_in_backward:
        yield from _in_backward(node)
    if node.parallel.cuts or node.parallel.tensor > 1 or node.parallel.expert > 1:
        yield from _cut(node)
    if node.parallel.tensor > 1:
        yield from _split(node)
    if node.parallel.expert > 1:
        yield from _experts(node)
    if node.parallel.context > 1:
        yield from _context(node)
    if node.parallel.pipeline > 1:
        yield from _piped(node)
    if isinstance(node.parallel.strategy, Zero):
        yield from _zero(node, node.parallel.strategy)


def _zero(node: Training, strategy: Zero) -> Iterator[Conflict]:
    """What DeepSpeed cannot be together with, and what a configuration of its own says against the recipe."""
    other = "parallel.strategy.kind"
    if not node.optim.elementwise:
        what = f"zero updates flat parts of tensors, and {node.optim.kind} looks at whole ones"
        yield Conflict("optim.kind", what, "use adamw, sgd or lion, or parallel.strategy=ddp", other)
    elif node.optim.constant:
        what = f"{node.optim.kind} evaluates other weights than it trains, and zero holds one kind"
        yield Conflict("optim.kind", what, "use adamw, sgd or lion, or parallel.strategy=fsdp", other)
    if node.types_name == "fp8":
        what = "fp8 was never tried with zero"
        yield Conflict("precision", what, "use bf16_mixed", other)
    if node.memory.optimizer_in_backward:
        what = "zero applies all gradients at once"
        yield Conflict("memory.optimizer_in_backward", what, "set it to false", other)
    if node.memory.offload_activations and strategy.stage == 3:
        what = "what the forward keeps holds weights that stage 3 gives back"
        yield Conflict(
            "memory.offload_activations", what, "set memory.recompute=full instead", "parallel.strategy.stage"
        )
    try:
        strategy.settings(node.types_name)
    except RecipeError as cause:
        for problem in cause.problems:
            yield Conflict("parallel.strategy.config", problem.what, problem.fix)


def _split(node: Training) -> Iterator[Conflict]:
    """Each rank holds a part of every linear, and computes with it."""
    lever = "parallel.tensor"
    if (odd := node.adapter.unsplit()) is not None:
        yield Conflict(f"adapter.{odd[0]}", odd[1], odd[2], lever)
    if node.quant.kind != "none":
        what = "weights are quantised in blocks of whole matrices, and each rank holds a part"
        yield Conflict("quant.kind", what, "set quant=none, or parallel.tensor=1", lever)
    if node.types_name == "fp8":
        what = "fp8 scales whole matrices, and each rank holds a part"
        yield Conflict("precision", what, "use bf16_mixed, or parallel.tensor=1", lever)
    if node.parallel.strategy.kind == "zero":
        what = "DeepSpeed cuts a model that is whole on every rank"
        yield Conflict("parallel.strategy", what, "set parallel.strategy=fsdp, or parallel.tensor=1", lever)


def _experts(node: Training) -> Iterator[Conflict]:
    """Each rank holds a part of the experts, and sees rows of its own."""
    lever = "parallel.expert"
    if node.parallel.tensor > 1:
        what = "experts would be cut by their number and by their width"
        yield Conflict("parallel.tensor", what, "keep one of the two", lever)
    if node.parallel.strategy.kind == "zero":
        what = "DeepSpeed shares a model that is the same on every rank"
        yield Conflict("parallel.strategy", what, "use ddp, or set parallel.expert=1", lever)
    if node.types_name == "fp8":
        what = "no test holds experts on several ranks together with fp8"
        yield Conflict("precision", what, "use bf16_mixed, or parallel.expert=1", lever)


def _cut(node: Training) -> Iterator[Conflict]:
    """Each rank holds a part of every parameter, or of some."""
    inner = "parallel.tensor" if node.parallel.tensor > 1 else "parallel.expert"
    lever = "parallel.strategy" if node.parallel.cuts else inner
    if not node.optim.elementwise:
        what = f"{node.optim.kind} needs whole matrices or blocks of them, and each rank holds a part"
        yield Conflict("optim.kind", what, f"use one of {', '.join(ELEMENTWISE)}, or ddp", lever)
    if node.memory.optimizer_in_backward:
        what = "gradients are summed over ranks when a layer's are all there, and it applies each before"
        yield Conflict("memory.optimizer_in_backward", what, "set memory.optimizer_in_backward=false", lever)
    if node.parallel.cuts and node.quant.kind == "bnb_int8":
        what = "the scales of 8-bit weights belong to whole matrices, and each rank holds a part"
        yield Conflict("quant.kind", what, "use quant=bnb_nf4 or none, or ddp", lever)


def _in_backward(node: Training) -> Iterator[Conflict]:
    """An update in the backward pass knows one gradient at a time, and cannot be taken back."""
    lever = "memory.optimizer_in_backward"
    if node.optim.clip:
        what = "the norm of all gradients is known when all updates are made"
        yield Conflict("optim.clip", what, "set optim.clip=0", lever)
    if node.guard.nonfinite == "skip":
        what = "a step whose updates are made cannot be skipped"
        yield Conflict("guard.nonfinite", what, "set guard.nonfinite=stop", lever)
    if node.types_name == "fp16_mixed":
        what = "an overflow must be seen before any update"
        yield Conflict("precision", what, "use bf16_mixed or fp32", lever)
    if node.batch.tokens is not None:
        what = "a step is one micro-batch, and how many rows hold its tokens is not known before"
        yield Conflict("batch.tokens", what, "use batch.rows", lever)
    elif isinstance(node.micro_batch, int) and node.micro_batch < node.batch.examples:
        what = f"{node.batch.examples} rows a step in micro-batches of {node.micro_batch} add up their gradients"
        yield Conflict("micro_batch", what, "set micro_batch=batch.rows, or auto", lever)


def _piped(node: Training) -> Iterator[Conflict]:
    """Each rank holds some layers, whole, and calls them in turn with the others."""
    lever, parallel = "parallel.pipeline", node.parallel
    if parallel.cuts or parallel.strategy.kind == "zero":
        what = "each rank holds whole layers, and beside a pipeline there are copies of it alone"
        yield Conflict("parallel.strategy", what, "set parallel.strategy=ddp, or parallel.pipeline=1", lever)
    for key in (key for key in ("tensor", "context", "expert") if getattr(parallel, key) > 1):
        what = "no test holds it together with a pipeline"
        yield Conflict(f"parallel.{key}", what, f"set parallel.{key}=1, or parallel.pipeline=1", lever)
    if node.memory.optimizer_in_backward:
        what = "gradients are summed when all micro-batches have been through, and it applies each before"
        yield Conflict("memory.optimizer_in_backward", what, "set memory.optimizer_in_backward=false", lever)
    if node.adapter.limits.packing:
        what = f"stages after the first see no tokens: {node.adapter.limits.packing}"
        yield Conflict("adapter.kind", what, "use lora or none, or parallel.pipeline=1", lever)
    for key in (key for key in ("add_tokens", "add_special_tokens") if getattr(node.model, key)):
        what = "its rows are trained beside embeddings and head, which lie in two stages"
        yield Conflict(f"model.{key}", what, "set parallel.pipeline=1", lever)
    if node.quant.kind != "none":
        what = "the memory of a quantised layer cannot be given up by the ranks that have no use for it"
        yield Conflict("quant.kind", what, "set quant=none, or parallel.pipeline=1", lever)
    if node.types_name == "fp8":
        yield Conflict("precision", "fp8 was never tried in stages", "use bf16_mixed", lever)
    if node.kind != "classify" and node.data.sources("valid") and node.evaluate.samples:
        what = "text is written by a whole model, and each rank holds a stage"
        yield Conflict("evaluate.samples", what, "set evaluate.samples=0, and generate from the result", lever)


def _context(node: Training) -> Iterator[Conflict]:
    """Rows that several ranks hold are dealt by their segments."""
    key, count = "parallel.context", node.parallel.context
    if node.data.max_length < 2 * count:
        what = f"rows of at most {node.data.max_length} tokens are too short for {count} ranks"
        yield Conflict(
            key, what, f"use {node.data.max_length // 2} or fewer, or a longer max_length", "data.max_length"
        )
    if node.adapter.limits.packing:
        what = f"the ranks hold parts of one row: {node.adapter.limits.packing}"
        yield Conflict(key, what, "set parallel.context=1", "adapter.kind")
