"""A small model beside the larger one that it learns to draft for, as one module: texts in, how near their laws are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmkit.core.types import Batch, Drafted
from llmkit.models.draft_foretold import Law, Rule, foretold
from llmkit.models.heads import Headed, Scored

ROWS = 128
"""Positions whose logits are held at a time."""
DRAFTS = 6
"""Drafts in turn that are compared with a text."""


class Student(Headed):
    """A small model in training; its teacher is frozen."""

    def __init__(self, model: nn.Module, teacher: Scored, rule: Rule) -> None:
        super().__init__(model)
        self.own, self.rule = Scored(model), rule
        self.teacher = [teacher.eval().requires_grad_(False)]  # in a list: it is no part of what is trained

    def forward(self, batch: Batch) -> Drafted:
        """What the small model says of the tokens that have a weight, as drafts of one token after each place."""
        chosen = (batch.weights != 0).nonzero(as_tuple=True)
        weights, labels = batch.weights[chosen], batch.labels[chosen]
        hidden, head = self.hidden(batch)[chosen].float(), self.causal[0].get_output_embeddings()
        bias, law = None if head.bias is None else head.bias.float(), self._law(batch, chosen)
        loss, common, best = foretold(hidden, head.weight.float(), bias, law, weights, self.rule, self.own.shape, ROWS)
        rows = chosen[0] * batch.tokens.shape[1] + chosen[1]
        kept = (common * weights).sum()
        return Drafted((loss,), (weights.sum(),), (kept,), rows, in_turn(rows, best == labels))

    def _law(self, batch: Batch, chosen: tuple[Tensor, ...]) -> Law:
        """A slice of the chosen rows -> the teacher's law after them, (n, V)."""
        teacher = self.teacher[0]
        head = teacher.causal[0].get_output_embeddings()
        with torch.no_grad():
            hidden = teacher.hidden(batch)[chosen]
            weight = head.weight.to(hidden.dtype)  # under autocast they come in 16 bits
            bias = None if head.bias is None else head.bias.to(hidden.dtype)

        def law(here: slice) -> Tensor:
            with torch.no_grad():
                logits = nn.functional.linear(hidden[here], weight, bias).float()
                return torch.softmax(teacher.shape.apply(logits), 1)

        return law


def in_turn(rows: Tensor, right: Tensor, most: int = DRAFTS) -> Tensor:
    """(N, `most`): whether drafts 0 ... k after each of rows (N,) are right, of which `right` (N,) says whether the
    first one is: a draft reads right ones before it, as it reads the text itself."""
    made = right.new_zeros(len(rows), most)
    for at in range(min(most, len(rows))):
        follows = (rows[at:] == rows[: len(rows) - at] + at) & right[at:]
        made[: len(rows) - at, at] = follows if not at else follows & made[: len(rows) - at, at - 1]
    return made
