"""A small model beside the larger one that it learns to draft for, as one module: texts in, how near their laws are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from llmkit.core.types import Batch, Drafted
from llmkit.models.draft_foretold import Rule
from llmkit.models.heads import Headed, Scored

ROWS = 128
"""Positions whose logits are held at a time."""
DRAFTS = 6
"""Drafts in turn that are compared with a text."""


class Near(Function):
    """The sum of w loss(q, p) over rows, whose gradients are made with it, block by block."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, law: Any, weights: Tensor, own: Any, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`hidden` (N, H) and the head `weight` (V, H), `bias` (V,) of the small model, `own` what its family does to
        logits; `law`: a slice of rows -> the teacher's law of them; `weights` (N,).

        Gives the sum, sum min(p, q) of each row (N,) and its likeliest word (N,).
        """
        learns = any(ctx.needs_input_grad[:3])
        to_hidden = torch.empty_like(hidden) if learns else hidden
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        total, common = hidden.new_zeros(()), hidden.new_empty(len(hidden))
        best = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        for start in range(0, len(hidden), ROWS):
            here = slice(start, start + ROWS)
            logits, p = own.apply(nn.functional.linear(hidden[here], weight, bias)), law(here)
            common[here] = torch.minimum(torch.softmax(logits, 1), p).sum(1)
            best[here] = logits.argmax(1)
            losses, slope = rule(logits, p)
            total += (losses * weights[here]).sum()
            if not learns:
                continue
            slope *= weights[here, None] * own.scale
            if (bent := own.slope(logits)) is not None:
                slope *= bent
            torch.mm(slope, weight, out=to_hidden[here])
            if to_weight is not None:
                to_weight.addmm_(slope.T, hidden[here])
            if to_bias is not None:
                to_bias += slope.sum(0)
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        ctx.mark_non_differentiable(common, best)
        return total, common, best

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """All were made with the sum."""
        return (*(None if made is None else grads[0] * made for made in ctx.saved_tensors), *[None] * 4)


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
        bias = None if head.bias is None else head.bias.float()
        made: Any = Near.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight.float(), bias, self._law(batch, chosen), weights, self.own.shape, self.rule
        )
        loss, common, best = made
        rows = chosen[0] * batch.tokens.shape[1] + chosen[1]
        kept = (common * weights).sum()
        return Drafted((loss,), (weights.sum(),), (kept,), rows, in_turn(rows, best == labels))

    def _law(self, batch: Batch, chosen: tuple[Tensor, ...]) -> Any:
        """A slice of the chosen rows -> the teacher's law after them, (n, V)."""
        teacher = self.teacher[0]
        with torch.no_grad():
            hidden = teacher.hidden(batch)[chosen]

        def law(here: slice) -> Tensor:
            with torch.no_grad():
                logits = teacher.causal[0].get_output_embeddings()(hidden[here]).float()
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
