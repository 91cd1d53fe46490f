"""The recipe's nodes for the loop: precision, memory, evaluation, checkpoints, guard, logs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from llmkit.build.precision import NAMES, Compute, Params
from llmkit.core.config import Conflict, Duration, config, setting


@config
class ByPart:
    """Precision by part."""

    params: Params = "fp32"
    """Of the weights that are trained, and of the optimizer's moments."""
    compute: Compute = "fp32"
    """Of products; fp16 scales its loss, fp8 needs a device that has it."""
    reduce: Literal["fp32", "bf16"] = setting(default="fp32", later=True)
    """Of gradients that are summed over ranks."""

    @property
    def named(self) -> str:
        """The name of the two together."""
        return NAMES[self.params, self.compute]

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if (self.params, self.compute) not in NAMES:
            what = f"weights held in {self.params} are multiplied in {self.params}"
            yield Conflict("compute", what, f"set compute: {self.params}, or params: fp32", "params")


Precision = Literal["auto", "fp32", "bf16", "bf16_mixed", "fp16_mixed", "fp8"] | ByPart


@config
class Batching:
    """What one optimizer step sees, over all ranks."""

    rows: int = setting(default=16, least=1)
    """Examples a step."""
    tokens: int | None = setting(default=None, least=2)
    """In place of `rows`: tokens a step, about, in equally many steps an epoch; as many examples as hold them."""
    pairs: int | None = setting(default=None, least=1)
    """In place of `rows`: pairs of a chosen and a rejected completion a step, in kind preference."""
    prompts: int | None = setting(default=None, least=1)
    """In place of `rows`: prompts a step, each with a group of answers, in kind policy."""

    def problems(self) -> Iterator[Conflict]:
        """Two ways to say how large a step is."""
        if self.tokens is not None and self.rows != Batching.rows:
            yield Conflict("rows", "both say how large a step is", "keep one of the two", "tokens")
        for key in (key for key in ("pairs", "prompts") if getattr(self, key) is not None):
            others = {"tokens": self.tokens is not None, "rows": self.rows != Batching.rows}
            others["pairs"] = key == "prompts" and self.pairs is not None
            for other in (other for other, said in others.items() if said):
                yield Conflict(key, "both say how large a step is", "keep one of the two", other)

    @property
    def examples(self) -> int:
        """Examples a step, whatever they are called."""
        return next((said for said in (self.pairs, self.prompts) if said is not None), self.rows)

    @property
    def least(self) -> int:
        """Examples that there must be."""
        return self.examples if self.tokens is None else 1


@config
class Memory:
    """What is given up to save memory."""

    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """Make activations again in the backward pass: those of every second layer (`selective`) or of all; `auto` takes
    the first of none, selective and full that fits."""
    offload_activations: bool = False
    """What the forward keeps waits in the host's memory; needs a device with a memory of its own."""
    optimizer_in_backward: bool = False
    """Each parameter is updated as soon as its gradient is whole: all gradients together are never held. Needs one
    micro-batch a step and no clipping."""


def _once(every: object, per_epoch: object) -> Iterator[Conflict]:
    if every is not None and per_epoch is not None:
        yield Conflict("every", "both say how often", "keep one of the two", "per_epoch")


@config
class Evaluating:
    """Evaluation on `data.valid` while training."""

    _short: ClassVar[str] = "every"
    every: int | None = setting(default=None, least=1)
    """Optimizer steps between evaluations; without it and `per_epoch` only before and after."""
    per_epoch: int | None = setting(default=None, least=1)
    """Evaluations a pass over the data, evenly apart, in place of `every`."""
    samples: int = setting(default=4, least=0)
    """Validation prompts that are answered at each evaluation and shown side by side in the report."""
    max_tokens: int = setting(default=64, least=1)
    """Tokens of each such answer."""
    rows: int | None = setting(default=None, least=1)
    """At most so many rows of `data.valid`, evenly apart."""
    patience: int | None = setting(default=None, least=1)
    """Early stopping: the run ends after so many evaluations in a row without a better `checkpoint.best`."""
    min_delta: float = setting(default=0.0, least=0.0)
    """What an evaluation must be better by to count for `patience`."""

    def problems(self) -> Iterator[Conflict]:
        """Two ways to say when."""
        yield from _once(self.every, self.per_epoch)
        if self.min_delta and self.patience is None:
            yield Conflict("min_delta", "nothing counts it without patience", "set patience, or drop min_delta")


@config
class Checkpointing:
    """When the state is saved and what is kept."""

    every: int | Duration | None = setting(default=None, above=0)
    """Optimizer steps, or a duration (`10m`); without it and `per_epoch` only at the end and when asked to stop."""
    per_epoch: int | None = setting(default=None, least=1)
    """Checkpoints a pass over the data, evenly apart, in place of `every`."""
    keep: int = setting(default=2, least=1)
    """Newest checkpoints that stay; the best one stays beside them."""
    best: str | None = None
    """A metric of the evaluations, such as valid.loss or, of a classifier, valid.f1: the run's result is then the best
    checkpoint, not the last. Which way is better is known of each."""
    background: bool = True
    """The loop waits for a copy of its tensors alone; they are hashed and written beside the next steps. It costs the
    memory of that copy: on a CPU, as much again as what is trained with its optimizer's state."""
    mirror: str | None = None
    """An address that fsspec knows (`s3://bucket/runs`, or a folder): each checkpoint is copied below it, to
    `NAME/step-N` for the NAME of `out`, and goes from there when it goes from here. A run whose `out` has no
    checkpoint yet goes on from the newest one there."""

    def problems(self) -> Iterator[Conflict]:
        """Two ways to say when."""
        yield from _once(self.every, self.per_epoch)


@config
class Guard:
    """What happens on a loss or a gradient that is not finite, or far above its median."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """`skip` leaves the weights and the optimizer untouched and goes on; three in a row stop the run. An evaluation
    whose loss is not finite meets the same policy: it stops the run, or counts for nothing."""
    spike: float = setting(default=10.0, least=0.0)
    """A loss above this many medians of the last 100 steps meets the same policy; 0 turns it off. It says nothing of a
    policy's loss, which is near 0, nor of medians below 0."""
    checksum: int = setting(default=0, least=0)
    """Every so many steps, and before each checkpoint, ranks that hold copies of parameters and optimizer state compare
    them bit by bit; one that differs is named and the run ends, to go on from the last checkpoint. 0 turns it off."""
