"""What answers are drawn by: an engine over the weights in training, or over a copy that is fed from them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from llmkit.build.held import Here
from llmkit.build.precision import Types
from llmkit.build.training import Built, build, headed, how
from llmkit.core.errors import ModelError, RecipeError
from llmkit.core.run import Run
from llmkit.evals.run import Subject, at_rest
from llmkit.inference.engined import EngineWriter
from llmkit.models.quiet import quiet
from llmkit.models.resolve import Resolved
from llmkit.parallel.chunks import Route
from llmkit.parallel.steps import Steps
from llmkit.rl.elsewhere import Crossing, Elsewhere
from llmkit.rl.sync import Copied, Drawn, Feeding, Versioned, shared
from llmkit.stages.from_rollouts import FromRollouts
from llmkit.stages.job import Job
from llmkit.stages.measured import subject
from llmkit.stages.published import published
from llmkit.stages.training import Training

T = TypeVar("T")


@dataclass(frozen=True)
class Drawing:
    """An engine for rollouts."""

    writer: Drawn
    subject: Subject
    copied: bool
    """Whether it has a model of its own."""
    copy: Built | None = None
    """That model, where it is here."""
    lone: bool = False
    """The main rank alone asks: others answer."""

    def over(self, work: Callable[[], T]) -> T:
        """Does work that asks the engine, as a forward pass of the model that it reads is done."""
        with self.subject.autocast():
            if self.copied:
                return work()
            with at_rest(self.subject):
                made: T = self.subject.scored.inside(work)
                return made


@contextmanager
def drawing(job: Job, node: FromRollouts, built: Built, steps: Steps) -> Iterator[Drawing]:
    """The engine of a policy stage.

    Raises:
        ModelError, RecipeError: it cannot draw from what is trained.
    """
    if node.rollout.vllm is not None:
        with published(job, built, steps, node.rollout.vllm, node.rollout.temperature) as served:
            yield Drawing(served, subject(job, built, steps), True)
        return
    _check(job, built, bool(node.rollout.asynchronous))
    if (apart := job.run.peers.apart) is not None:
        crossing = Crossing(apart.whole, steps.lying, steps.params, {})
        there, messages = Elsewhere(apart, crossing, job.run.stop.hear), len(crossing.route.messages)
        job.run.console.notice(f"answers are drawn on ranks of their own ({node.aside}), fed in {messages} messages")
        yield Drawing(there, subject(job, built, steps), True, lone=True)
        there.end()
        return
    world = job.run.ranks.world
    drawn = node.draws(world)
    if drawn is None:
        raise TypeError("the stage draws no answers")
    most = drawn.room(world)
    here, feeding, own = Here(built.loaded, built.model, most=most), cast(Feeding, shared), None
    if node.rollout.asynchronous or not node.parallel.at_hand(world):
        own, feeding = _copied(job, built, steps)
        here = Here(own.loaded, own.model, most=most)
    writer = node.rollout.engine.open(here)
    if not isinstance(writer, EngineWriter):
        raise TypeError("the engine draws")
    versioned = Versioned(writer, feeding)
    try:
        yield Drawing(versioned, subject(job, built, steps), own is not None, own)
    finally:
        versioned.close()


def _copied(job: Job, built: Built, steps: Steps) -> tuple[Built, Feeding]:
    """A model of this rank's own that is as the one in training was put together, and what is to bring it what was
    learned since."""
    run = job.run
    at_hand = job.node.parallel.at_hand(run.ranks.world)
    made = beside(built) if at_hand else again(job.node, run, job.resolved, job.types)
    made.model.eval()
    route = Route(run.peers, made.trained, steps.lying)
    told = (
        "a copy of what is trained" if at_hand else f"a whole copy on each rank, fed in {len(route.messages)} messages"
    )
    run.console.notice(f"answers are drawn from {told}")
    return made, Copied(run.peers, steps.lying, made.trained, run.device, route)


def again(node: Training, run: Run, resolved: Resolved, kinds: Types) -> Built:
    """The whole model from the same files: what is not trained never moves."""
    held = how(run.device, kinds, node.quant, node.adapter, run.grants.code, run.grants.nonfinite)
    made = build(resolved, node.model, held, node.adapter, 0, node.seed)
    quiet(made.model)
    made.model.requires_grad_(False)
    return made


def beside(built: Built) -> Built:
    """A model with parameters of its own for what is trained, marked as trained, by which the head knows the way that
    training goes. All else is there once, while it is made too."""
    held = [*(p for p in built.model.parameters() if not p.requires_grad), *built.model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in held}
    model = copy.deepcopy(built.model, memo)
    loaded = replace(built.loaded, model=memo[id(built.loaded.model)])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Built(loaded, model, headed(loaded, model), trained)


def _check(job: Job, built: Built, asynchronous: bool) -> None:
    if not built.loaded.support.paged:
        what = f"its answers cannot be drawn by the engine: {built.loaded.support.reason}"
        raise ModelError(what, fix="use a model of the support table (docs/support.md)", key="model")
    if asynchronous and job.run.ranks.world > 1:
        what = "a thread draws beside the one that trains, and ranks would talk in both at once"
        raise RecipeError(what, fix="set rollout.asynchronous=0, or run one process", key="rollout.asynchronous")
    if asynchronous and job.node.quant.kind == "bnb_int8":
        what = "8-bit linears take the rows of a weight for one module alone, and a copy has the same weights"
        fix = "set rollout.asynchronous=0, or quant=bnb_nf4"
        raise RecipeError(what, fix=fix, key="rollout.asynchronous")
    if job.types.compute == "fp8" and not job.node.parallel.at_hand(job.run.ranks.world):
        what = "the engine's copy of a model that is cut does not compute in fp8"
        raise RecipeError(what, fix="set precision=bf16, or parallel.strategy=ddp", key="precision")
