"""The loop: a function over plain values.

One step: the batches of a global index -> sums and counts -> guard -> update -> one line; then, when due, evaluation
and a checkpoint. All that happens depends on the step number and on what a checkpoint holds, never on how often the run
was interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from llmkit.core.errors import DataError, LlmkitError, Stopped
from llmkit.core.own import at
from llmkit.core.seed import reseed
from llmkit.core.types import Batch, LossSum
from llmkit.parallel.steps import PLAIN, Adaptive, Loss
from llmkit.train.guard import Watch, judge_evaluation, named
from llmkit.train.node import Checkpointing, Evaluating, Guard
from llmkit.train.schedule import Schedule


class Stepper(Protocol):
    """How a strategy makes and applies gradients."""

    def rate(self, factor: float) -> None:
        """Sets the rates of the step that comes."""
        ...

    def accumulate(self, batches: Iterator[Batch], loss: Loss, count: float, turns: int = 1) -> LossSum:
        """Adds the gradients of sum(loss) / count over `turns` micro-batches; gives the sums of all ranks."""
        ...

    def grad_norm(self) -> float:
        """The norm of all gradients together."""
        ...

    def overflowed(self) -> bool:
        """Whether gradients that are not finite may be fp16's fault."""
        ...

    def step(self, factor: float, clip: float, norm: float) -> None:
        """Applies the gradients."""
        ...

    def drop(self) -> None:
        """Forgets the gradients."""
        ...


@dataclass(frozen=True)
class StepData:
    """What one optimizer step sees."""

    epoch: int
    ids: tuple[int, ...]
    batches: Sequence[Batch]
    tokens: int
    supervised: int
    count: float
    """The sum of all weights, over all ranks."""
    numbers: Sequence[int] = ()
    """Which of the step's micro-batches over all ranks `batches` are; all of them, in their order, where not said."""
    places: tuple[tuple[str, int], ...] = ()
    """File and line that each of `ids` came from."""


@dataclass(frozen=True)
class Progress:
    """Where a run is: all that the loop keeps between steps, and all of it in a checkpoint."""

    step: int = 0
    watch: Watch = field(default_factory=Watch)
    best: float | None = None
    best_step: int | None = None
    skipped: int = 0
    evaluated: int = -1
    """The last step that was evaluated: a run that stopped before its evaluation makes up for it."""
    saved: int = 0
    """The last step that was saved on the schedule."""
    stale: int = 0
    """Evaluations in a row that were no better."""


@dataclass(frozen=True)
class Plan:
    """What the loop is told once."""

    steps: int
    steps_per_epoch: int
    seed: int
    rate: float
    clip: float
    schedule: Schedule
    guard: Guard
    evaluate: Evaluating
    checkpoint: Checkpointing
    larger: bool = False
    """Whether more of `checkpoint.best` is better."""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls: everything that touches a disk or a screen is outside of it."""

    data: Callable[[int], StepData]
    """0-based step -> its batches."""
    log: Callable[[dict[str, Any]], None]
    evaluate: Callable[[int], dict[str, float]] | None
    """Step -> metrics of the validation data."""
    save: Callable[[Progress, bool], None]
    """Publishes a checkpoint; True when it is on the schedule and so has its line in the metrics."""
    asked_to_stop: Callable[[], str]
    """Why the run should stop, or nothing."""
    measure: Callable[[StepData, float], dict[str, float]]
    """Step data and seconds -> the machine's own figures (tokens per second, mfu, peak memory)."""
    show: Callable[[dict[str, Any]], None]
    phase: Callable[[str, int], None] = lambda name, step: None
    """Name and step, 1-based: where the loop is now."""
    verify: Callable[[int, bool], None] = lambda step, due: None
    """A step is done: what other ranks hold is compared, where that is due; before a checkpoint it is."""
    elapsed: Callable[[float], float] = float
    """Seconds by this rank's clock -> those that all ranks go by."""
    alone: bool = True
    """No other rank has to save with this one: an evaluation may fail on one of them alone."""


class Told:
    """A loss that says when a forward pass is over."""

    def __init__(self, loss: Loss, done: Callable[[], None]) -> None:
        self.loss, self.done, self.needs = loss, done, getattr(loss, "needs", PLAIN)

    def __call__(self, scores: Any, batch: Batch, /) -> LossSum:
        """The loss itself."""
        made = self.loss(scores, batch)
        self.done()
        return made


def fit(stepper: Stepper, loss: Loss, plan: Plan, hooks: Hooks, start: Progress) -> Progress:
    """Trains from `start` to `plan.steps`, or until evaluations have not become better for `plan.evaluate.patience`.

    Raises:
        Stopped: the run was asked to stop; the last finished step is saved.
        ResourceError: the guard's policy is to stop; the last checkpoint is untouched.
    """
    progress, saved_at = start, time.monotonic()
    while True:
        if _evaluation_due(plan, progress.step) and progress.evaluated != progress.step:
            progress = _evaluated(progress, plan, hooks)
        since = partial(_since, hooks, saved_at)
        if progress.step and progress.saved != progress.step and _save_due(plan, progress, since):
            progress, saved_at = replace(progress, saved=progress.step), time.monotonic()
            hooks.verify(progress.step, True)
            hooks.phase("save", progress.step)
            hooks.save(progress, True)
        if _ended(plan, progress):
            return progress
        try:
            with at(f"step {progress.step + 1}"):
                progress = _one_step(stepper, loss, plan, hooks, progress)
        except Stopped:
            stepper.drop()
            hooks.phase("save", progress.step)
            hooks.save(progress, False)
            raise


def _one_step(stepper: Stepper, loss: Loss, plan: Plan, hooks: Hooks, before: Progress) -> Progress:
    began, step = time.monotonic(), before.step + 1
    hooks.phase("data", step)
    data, factor = hooks.data(before.step), plan.schedule(step, plan.steps)
    stepper.rate(factor)
    if isinstance(loss, Adaptive):
        loss.begin(data.ids)
    told = Told(loss, lambda: hooks.phase("backward", step))
    sums = stepper.accumulate(_seeded(data, plan.seed, step, hooks), told, data.count, len(data.batches))
    hooks.phase("step", step)
    mean, norm = float(sums.total) / data.count, stepper.grad_norm()
    if math.isfinite(mean) and not math.isfinite(norm) and stepper.overflowed():  # no fault of the samples
        applied, watch = False, before.watch
    else:
        applied, watch = before.watch.judge(plan.guard, step, mean, norm, named(data.ids, data.places))
    if applied:
        stepper.step(factor, plan.clip, norm)
        if isinstance(loss, Adaptive):
            loss.update(sums)
    else:
        stepper.drop()
    hooks.phase("log", step)
    line = _line(plan, data, step, mean, norm, factor, applied)
    line |= {name: float(top) / float(bottom) for name, (top, bottom) in sums.extras.items()}
    seconds = time.monotonic() - began
    line |= {"seconds": seconds, **hooks.measure(data, seconds)}
    hooks.log(line)
    hooks.show(line)
    hooks.verify(step, False)
    return replace(before, step=step, watch=watch, skipped=before.skipped + (not applied))


def _seeded(data: StepData, seed: int, step: int, hooks: Hooks) -> Iterator[Batch]:
    """The micro-batches, each with its own randomness, until someone asks to stop."""
    for index, batch in zip(data.numbers or range(len(data.batches)), data.batches, strict=True):
        if why := hooks.asked_to_stop():
            raise Stopped(f"{why} in step {step}", fix="run the same command again to go on")
        hooks.phase("forward", step)
        reseed(seed, step, index)
        yield batch


def _line(
    plan: Plan, data: StepData, step: int, loss: float, norm: float, factor: float, applied: bool
) -> dict[str, Any]:
    line: dict[str, Any] = {
        "event": "train",
        "step": step,
        "epoch": step / plan.steps_per_epoch,
        "loss": loss,
        "grad_norm": norm,
        "lr": plan.rate * factor,
        "tokens": data.tokens,
        "supervised_tokens": data.supervised,
        "samples": len(data.ids),
    }
    if applied:
        return line
    return line | {"skipped": list(data.ids), "skipped_rows": [f"{file}:{at}" for file, at in data.places]}


def _ended(plan: Plan, progress: Progress) -> bool:
    patience = plan.evaluate.patience
    return progress.step >= plan.steps or (patience is not None and progress.stale >= patience)


def _evaluation_due(plan: Plan, step: int) -> bool:
    at_an_end = step in (0, plan.steps)
    if plan.evaluate.per_epoch is not None:
        return at_an_end or _crossed(step, plan.evaluate.per_epoch, plan.steps_per_epoch)
    return at_an_end or (plan.evaluate.every is not None and step % plan.evaluate.every == 0)


def _crossed(step: int, per_epoch: int, steps_per_epoch: int) -> bool:
    """Whether a step ends one of `per_epoch` equal parts of a pass; of two ends in one step there is one."""
    return step > 0 and step * per_epoch // steps_per_epoch > (step - 1) * per_epoch // steps_per_epoch


def _evaluated(progress: Progress, plan: Plan, hooks: Hooks) -> Progress:
    """The progress after an evaluation: the best value so far is kept; what was trained is saved if it fails. Of
    several ranks it may fail on one, with which the others cannot save: they hear of it, and all go back to the last
    checkpoint.

    What is not finite is never the best, and meets the guard's policy: weights that gave it are not saved by it.
    """
    step = progress.step
    if hooks.evaluate is None:
        return replace(progress, evaluated=step)
    hooks.phase("evaluate", step)
    try:
        with at(f"the evaluation after step {step}"):
            figures = hooks.evaluate(step)
    except Exception as cause:
        if step and hooks.alone:
            hooks.save(progress, False)
        if isinstance(cause, LlmkitError):
            raise
        raise DataError(
            f"the evaluation after step {step} failed: {cause}", key="evaluate", fix="see the traceback with --debug"
        ) from cause
    line = {"event": "evaluate", "step": step, **figures}
    hooks.log(line)
    hooks.show(line)
    after = replace(progress, evaluated=step)
    judge_evaluation(plan.guard, step, figures)
    return _compared(after, plan, figures.get(plan.checkpoint.best or "", math.nan)) if step else after


def _compared(progress: Progress, plan: Plan, value: float) -> Progress:
    """The progress with a newly measured value: the best so far, and how long it has not become clearly better."""
    gained = math.inf if progress.best is None else (value - progress.best) * (1 if plan.larger else -1)
    better = math.isfinite(value) and gained > 0
    clearly = better and gained > plan.evaluate.min_delta
    after = replace(progress, stale=0 if clearly else progress.stale + 1)
    return replace(after, best=value, best_step=progress.step) if better else after


def _since(hooks: Hooks, then: float) -> float:
    return hooks.elapsed(time.monotonic() - then)


def _save_due(plan: Plan, progress: Progress, since: Callable[[], float]) -> bool:
    every, step = plan.checkpoint.every, progress.step
    if _ended(plan, progress) or progress.best_step == step:
        return True
    if plan.checkpoint.per_epoch is not None:
        return _crossed(step, plan.checkpoint.per_epoch, plan.steps_per_epoch)
    if isinstance(every, int):
        return step % every == 0
    return every is not None and since() >= every
