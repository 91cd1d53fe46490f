"""How likely models find answers: the log-probabilities of all their tokens by the policy as it is and by its
reference, by the forward and in the batches of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkit.build.training import Built
from llmkit.core.types import Batch, Entropic, Needs
from llmkit.data.batches import micro_batches
from llmkit.data.node import NoPacking
from llmkit.data.rolled import Rolled
from llmkit.evals.run import Subject
from llmkit.models.heads import Scored
from llmkit.models.referred import resting, without_adapter
from llmkit.parallel.steps import PLAIN, Steps
from llmkit.stages.from_rollouts import FromRollouts
from llmkit.stages.job import Job
from llmkit.stages.measured import subject
from llmkit.stages.reference import Second
from llmkit.stages.referring import loaded


class Likelihoods:
    """Of each completion's tokens a figure each, by a forward; 0 where they have no weight."""

    def __init__(self, job: Job, built: Built, subject: Subject, reference: Any = None) -> None:
        """`reference`: a second model that the policy is compared with; without one, what is below its adapter. The
        policy is asked for what the stage's loss reads of the head, so that it goes the way that it will in training.
        """
        needs: Needs = getattr(job.loss, "needs", PLAIN)
        if not isinstance(built.scored, Scored):
            raise TypeError("a policy is a language model")
        self.job, self.support, self.subject = job, built.loaded.support, subject
        self.model, self.second = built.model, reference
        self.needs, self.plain = needs, Needs(by_weight=False, temperature=needs.temperature)

    def policy(self, bare: Rolled) -> list[list[float]]:
        """By the policy as it is now."""
        return self.each(bare, lambda batch: logps_of(self.subject.scored(batch, self.needs)))

    def reference(self, bare: Rolled) -> list[list[float]]:
        """By its reference."""
        return self.each(bare, self._reference)

    def each(self, bare: Rolled, forward: Callable[[Batch], Tensor]) -> list[list[float]]:
        """What a forward, without gradients, says of the tokens: a batch -> (N,), as a loss gets it."""
        return self.both(bare, lambda batch: (forward(batch),))[0]

    def both(
        self, bare: Rolled, forward: Callable[[Batch], tuple[Tensor, ...]], count: int = 1
    ) -> list[list[list[float]]]:
        """The same of a forward that says `count` things."""
        found = np.zeros((len(bare.ids), count), np.float64)
        placed = replace(bare, each={"place": np.arange(len(bare.ids))})
        share = self.subject.share
        for batch in self._batches(placed):
            with torch.no_grad(), self.subject.autocast():
                said = forward(batch)
            if batch.branches is not None:
                found[batch.branches.each["place"].cpu().numpy()] = torch.stack(said, 1).float().cpu().numpy()
        if share.count > 1:
            parts = share.gather([[int(i), found[i].tolist()] for i in np.flatnonzero(found.any(1))])
            for i, value in (pair for part in parts for pair in part):
                found[i] = value
        spans = [span for i in range(len(bare)) for span in bare.completions(i)]
        return [[found[a:b, at].tolist() for a, b in spans] for at in range(count)]

    def _reference(self, batch: Batch) -> Any:
        """By the second model, or by the first without its adapter: through its own forward, where a strategy that has
        cut it sees to its weights."""
        if self.second is not None:
            return self.second(batch, self.plain)
        with resting(self.subject.scored), without_adapter(self.model):
            return self.subject.scored(batch, self.plain)

    def _batches(self, made: Rolled) -> Iterator[Batch]:
        job, node, share = self.job, self.job.node, self.subject.share
        packing = node.data.packing if self.support.packed else NoPacking()
        rows, size = range(len(made)), node.row_tokens
        make = partial(micro_batches, made, rows, packing, size, job.choice.rows, self.support.packed)
        yield from make(job.run.device, share.index, share.count, self.support.tree)


def likelihoods(job: Job, node: FromRollouts, built: Built, steps: Steps) -> Likelihoods:
    """Of a stage's policy and of what it is not to leave, which is loaded where it is another model."""
    second = None
    if node.priced and isinstance(node.reference, Second):
        second = loaded(node, node.reference.path or node.model, job.run)
    return Likelihoods(job, built, subject(job, built, steps), second)


def logps_of(scores: Tensor | Entropic) -> Tensor:
    """The log-probabilities alone."""
    return scores.logps if isinstance(scores, Entropic) else scores
