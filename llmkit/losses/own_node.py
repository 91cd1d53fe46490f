"""Functions of the user's own in the place of the losses of `kind: preference`, over pairs, and of `kind: sft`, over
tokens. Light."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from llmkit.core.config import Conflict, config
from llmkit.core.own import Own, own_of
from llmkit.core.types import LossSum, Needs
from llmkit.core.usercode import unreadable

if TYPE_CHECKING:
    from torch import Tensor

    from llmkit.core.types import Batch
    from llmkit.losses.sides import Judged, Sides


@config
class OwnPairs:
    """A function of your own, `loss(policy, reference) -> losses`: of P pairs the loss of each, (P,). Both are
    `llmkit.losses.sides.Sides`: `chosen` and `rejected`, log-probabilities of the completions, with `chosen_tokens` and
    `rejected_tokens`, their lengths, (P,) each in fp64. `return losses, figures` logs figures too, (P,) each by name:
    `reward_chosen` and `reward_rejected` take the place of those that are logged without them, log pi - log pi_ref. It
    runs if `--allow-python` was given once for the file as it is."""

    kind: Literal["python"] = "python"
    ref: str
    """FILE.py:FUNCTION, such as ./my.py:loss."""
    needs_reference: bool = True
    """Whether it compares with a reference; else `reference` is None, and nobody is asked."""
    whole_step: bool = False
    """Whether it compares the pairs of a step with each other: a step is then one micro-batch of one process."""
    tail: ClassVar[float] = 1.0

    def problems(self) -> Iterator[Conflict]:
        """A name of no function."""
        yield from unreadable(self.ref)

    def begin(self, own: Own) -> None:
        """
        Raises:
            OwnError: it gives no losses of a few pairs, or none with a gradient.
        """
        from llmkit.losses.own import try_pairs

        try_pairs(own, self.needs_reference)

    def __call__(self, policy: Sides, reference: Sides | None) -> Judged:
        """The losses of the pairs."""
        from llmkit.losses.own import pairs

        return pairs(own_of(self), policy, reference)


@config
class OwnTokens:
    """A function of your own, `loss(logps) -> losses`: of the log-probabilities of N tokens, all that count, the loss
    of each, (N,), which is multiplied with its weight in the row. `return losses, figures` logs figures too, (N,) each
    by name, as means by these weights. It runs if `--allow-python` was given once for the file as it is."""

    kind: Literal["python"] = "python"
    ref: str
    """FILE.py:FUNCTION, such as ./my.py:loss."""

    def problems(self) -> Iterator[Conflict]:
        """A name of no function."""
        yield from unreadable(self.ref)

    @property
    def needs(self) -> Needs:
        """What it reads of the head."""
        return Needs(by_weight=False)

    def begin(self, own: Own) -> None:
        """
        Raises:
            OwnError: it gives no losses of a few tokens, or none with a gradient.
        """
        from llmkit.losses.own import try_logps

        try_logps(own)

    def __call__(self, scores: Tensor, batch: Batch) -> LossSum:
        """The sum of the losses by their weights, and of the weights."""
        from llmkit.losses.own import tokens

        return tokens(own_of(self), scores, batch.weights[batch.weights != 0])
