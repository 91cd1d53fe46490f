"""A small model beside the larger one that it learns to draft for, as one module: texts in, how near their laws are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmkit.core.types import Batch, Drafted
from llmkit.models.foretold import Rule, foretold, kept
from llmkit.models.heads import Headed, Scored
from llmkit.models.teacher import Teacher

ROWS = 128
"""Positions whose logits are held at a time."""
DRAFTS = 6
"""Drafts in turn that are compared with a text."""


class Student(Headed):
    """A small model in training; its teacher is frozen."""

    def __init__(self, model: nn.Module, teacher: Scored, rule: Rule) -> None:
        super().__init__(model)
        self.own, self.rule, self.teacher = Scored(model), rule, Teacher(teacher)

    def forward(self, batch: Batch) -> Drafted:
        """What the small model says of the tokens that have a weight, as drafts of one token after each place."""
        chosen = (batch.weights != 0).nonzero(as_tuple=True)
        weights, labels = batch.weights[chosen], batch.labels[chosen]
        hidden, head = self.hidden(batch)[chosen].float(), self.causal[0].get_output_embeddings()
        bias, said = None if head.bias is None else head.bias.float(), self.teacher.logits(batch, chosen)
        judge = kept(lambda here: torch.softmax(said(here), 1), self.rule)
        loss, common, best = foretold(hidden, head.weight.float(), bias, judge, weights, self.own.shape, ROWS)
        rows = chosen[0] * batch.tokens.shape[1] + chosen[1]
        common_sum = (common * weights).sum()
        return Drafted((loss,), (weights.sum(),), (common_sum,), rows, in_turn(rows, best == labels))


def in_turn(rows: Tensor, right: Tensor, most: int = DRAFTS) -> Tensor:
    """(N, `most`): whether drafts 0 ... k after each of rows (N,) are right, of which `right` (N,) says whether the
    first one is: a draft reads right ones before it, as it reads the text itself."""
    made = right.new_zeros(len(rows), most)
    for at in range(min(most, len(rows))):
        follows = (rows[at:] == rows[: len(rows) - at] + at) & right[at:]
        made[: len(rows) - at, at] = follows if not at else follows & made[: len(rows) - at, at - 1]
    return made
