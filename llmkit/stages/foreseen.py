"""What a step needs to know of the policy before it begins: how far it is from its reference, over the whole step."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmkit.core.types import Batch
from llmkit.data.batches import micro_batches
from llmkit.data.groups import Groups
from llmkit.data.mismatched import mismatched
from llmkit.data.node import NoPacking
from llmkit.losses.kto import baseline, distance, with_baseline
from llmkit.models.probe import Support
from llmkit.models.referred import resting
from llmkit.parallel.steps import Steps
from llmkit.stages.job import Job
from llmkit.train.fit import StepData


def with_distance(job: Job, steps: Steps, support: Support, index: int, data: StepData) -> StepData:
    """The step's batches with KTO's baseline: by the weights before the step, of all its examples and ranks. A step of
    one example, as the last of an epoch may be, tells nothing of it: it is 0."""
    drawn = job.feed.step(index)
    if not isinstance(drawn.data, Groups):
        raise TypeError("these rows are no completions of prompts")
    z = 0.0
    if len(drawn.rows) > 1:
        odd = mismatched(drawn.data, drawn.rows, job.node.row_tokens)
        z = baseline(*steps.team.totals({"": _sums(job, steps, support, odd)})[""])
    return replace(data, batches=[with_baseline(batch, z) for batch in data.batches])


def _sums(job: Job, steps: Steps, support: Support, odd: Groups) -> tuple[float, float]:
    """Of this rank's share."""
    top = bottom = 0.0
    for batch in _batches(job, support, odd):
        with torch.no_grad(), resting(steps.scored), steps.autocast():
            said = steps.scored(batch)
        one, count = distance(said.policy, said.reference, batch)
        top, bottom = top + float(one), bottom + float(count)
    return top, bottom


def _batches(job: Job, support: Support, odd: Groups) -> list[Batch]:
    node = job.node
    packing = node.data.packing if support.packed else NoPacking()
    dealt = node.parallel.deal(job.run.ranks, node.deterministic)
    ids, size, rows, device = range(len(odd)), node.row_tokens, job.choice.rows, job.run.device
    shares = [
        micro_batches(odd, ids, packing, size, rows, support.packed, device, share, dealt.count, support.tree)
        for share in dealt.shares
    ]
    return [batch for share in shares for batch in share]
