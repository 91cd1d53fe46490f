"""A function of the user's own over tokens that a policy drew, in the place of the losses of `kind: policy`. Light."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from llmkit.core.config import Conflict, config
from llmkit.core.own import Own, own_of
from llmkit.core.usercode import unreadable
from llmkit.losses.over_policy_node import Advantage, OverPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from llmkit.losses.policy import Drawn


@config
class OwnPolicy(OverPolicy):
    """A function of your own, `loss(drawn) -> losses`: of N tokens of answers, all that count, the loss of each, (N,).
    `drawn` (`llmkit.losses.policy.Drawn`) holds `logps`, `old`, `reference`, `advantages`, `weights` and `entropy`,
    (N,) each; `drawn.summed`, `mean` and `spread` go from tokens to answers and back. `return losses, figures` logs
    figures too, (N,) each by name, as means over tokens. `beta`, `kl`, `truncate` and `entropy` are added to it as to
    any other loss. It runs if `--allow-python` was given once for the file as it is."""

    kind: Literal["python"] = "python"
    ref: str
    """FILE.py:FUNCTION, such as ./my.py:loss."""
    advantage: Advantage = "group"
    needs_reference: bool = False
    """Whether `drawn.reference` is asked for, though `beta` is 0."""
    per: Literal["answer", "token"] = "answer"
    """What counts alike: each answer, by the mean over its tokens, or each token of the step."""

    def problems(self) -> Iterator[Conflict]:
        """A name of no function."""
        yield from super().problems()
        yield from unreadable(self.ref)

    def begin(self, own: Own) -> None:
        """
        Raises:
            OwnError: it gives no losses of a few tokens, or none with a gradient.
        """
        from llmkit.losses.own import try_tokens

        try_tokens(own, self.compares)

    @property
    def compares(self) -> bool:
        """Whether it, or the price on the divergence, reads what the reference says."""
        return self.needs_reference or self.beta > 0

    @property
    def even(self) -> bool:
        """Whether each answer counts alike."""
        return self.per == "answer"

    @property
    def per_token(self) -> bool:
        """Whether the count is of tokens; else of answers."""
        return not self.even

    def surrogate(self, seen: Drawn, ratio: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What the function gives."""
        from llmkit.losses.own import surrogate

        return surrogate(own_of(self), seen)
