"""A student beside what its teacher says, as one module: a batch in, how far its laws are from the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from llmkit.core.types import Batch, Compared, Needs
from llmkit.models.foretold import Judge, foretold
from llmkit.models.heads import Headed, Scored
from llmkit.models.logits import slices

ROWS = {"cpu": 128, "cuda": 1024}
"""Positions whose logits are held at a time."""
Compare = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Logits (n, V) over the temperature -> how far their law is from the teacher's (n,), and its gradient (n, V)."""
Say = Callable[[Batch, tuple[Tensor, ...]], Callable[[slice], Compare]]
"""A batch and its chosen places -> of a slice of them, what compares with the teacher."""
Mixture = Callable[[Tensor, Tensor, Compare], tuple[Tensor, Tensor, Tensor]]
"""Logits (n, V), labels (n,) and what compares -> the loss (n,), nll (n,), and the loss's gradient (n, V)."""


class Distilled(Headed):
    """A student in training."""

    def __init__(self, model: nn.Module, say: Say, mixture: Mixture, words: int | None = None) -> None:
        """`say` tells what the teacher says, `mixture` is the loss; `words`: rows of the vocabulary that both have."""
        super().__init__(model)
        self.shape, self.say, self.mixture = Scored(model).shape, say, mixture
        self.words = words or len(self.causal[0].get_output_embeddings().weight)

    def forward(self, batch: Batch, needs: Needs = Needs()) -> Compared:
        """The sums over the tokens that have a weight."""
        chosen = (batch.weights != 0).nonzero(as_tuple=True)
        weights, labels = batch.weights[chosen], batch.labels[chosen]
        told, hidden = self.say(batch, chosen), self.hidden(batch)[chosen]

        def judge(logits: Tensor, here: slice) -> tuple[Tensor, Tensor, Tensor]:
            return self.mixture(logits, labels[here], told(here))

        head, rows = self.causal[0].get_output_embeddings(), ROWS[hidden.device.type]
        if type(head) is nn.Linear:
            weight = self._shared(head.weight).float()
            bias = None if head.bias is None else self._shared(head.bias).float()
            loss, nll, _ = foretold(hidden.float(), weight, bias, judge, weights, self.shape, rows)
            return Compared(loss, (nll * weights).sum())
        return self._wrapped(head, hidden, judge, weights, rows)

    def _shared(self, rows: Tensor) -> Tensor:
        """Those of the words that both models have."""
        return rows if len(rows) == self.words else rows[: self.words]

    def _wrapped(self, head: nn.Module, hidden: Tensor, judge: Judge, weights: Tensor, rows: int) -> Compared:
        """The same through a head that is more than a linear; each block is made again in the backward."""

        def run(part: Tensor, here: slice) -> tuple[Tensor, Tensor]:
            logits = self.shape.apply(head(part).float())[:, : self.words]
            made: Any = _Judged.apply(logits, judge, here)  # type: ignore[no-untyped-call]
            return cast(tuple[Tensor, Tensor], made)

        loss = nll = hidden.new_zeros((), dtype=torch.float32)
        for here in slices(len(hidden), rows) or [slice(0, 0)]:  # also of none
            losses, told = checkpoint(run, hidden[here], here, use_reentrant=False)
            loss, nll = loss + (losses * weights[here]).sum(), nll + (told * weights[here]).sum()
        return Compared(loss, nll.detach())


class _Judged(Function):
    """A loss whose gradient is made with it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, judge: Judge, here: slice) -> tuple[Tensor, Tensor]:
        with torch.autocast(logits.device.type, enabled=False):
            losses, told, slope = judge(logits, here)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(told)
        return losses, told

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """By the logits."""
        (slope,) = ctx.saved_tensors
        return slope * grads[0][:, None], None, None
