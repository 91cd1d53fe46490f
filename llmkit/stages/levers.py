"""What contradicts what among optimizer, precision and memory, and what of them a device must have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmkit.core.config import Conflict
from llmkit.core.errors import RecipeError
from llmkit.parallel.node import Zero
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
    if isinstance(node.parallel.strategy, Zero):
        yield from _zero(node, node.parallel.strategy)


def _zero(node: Training, strategy: Zero) -> Iterator[Conflict]:
    """What DeepSpeed cannot be together with, and what a configuration of its own says against the recipe."""
    other = "parallel.strategy.kind"
    if not node.optim.elementwise:
        what = f"zero updates flat parts of tensors, and {node.optim.kind} looks at whole ones"
        yield Conflict("optim.kind", what, "use adamw or sgd, or parallel.strategy=fsdp", other)
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
    elif isinstance(node.micro_batch, int) and node.micro_batch < node.batch.rows:
        what = f"{node.batch.rows} rows a step in micro-batches of {node.micro_batch} add up their gradients"
        yield Conflict("micro_batch", what, "set micro_batch=batch.rows, or auto", lever)
