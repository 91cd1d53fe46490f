"""Where the next token of an answer is chosen, and those after it as long as they are what was drafted.

Drafts are looked at one after another, each with the law that the tokens before it make, so that what is chosen is what
would be chosen without them (sample and match): the likeliest token, or the one that the number of the place draws.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from llmkit.inference.request import Request, Token
from llmkit.inference.runner import Rows
from llmkit.inference.sequence import Sequence


class Place:
    """The end of a sequence in one step."""

    def __init__(self, sequence: Sequence, rows: Rows, drafts: Seq[int] = ()) -> None:
        """`rows`: logits after its newest token and after each of `drafts`, at the end of those of its chunk."""
        self.sequence, self.rows, self.drafts = sequence, rows, drafts
        self.made: list[Token] = []
        """What was chosen so far."""

    @property
    def request(self) -> Request:
        """Whose it is."""
        return self.sequence.request

    @property
    def logits(self) -> Tensor:
        """(V,): of what follows."""
        return self.rows[len(self.rows) - 1 - len(self.drafts) + len(self.made)]

    def take(self, token: Token) -> bool:
        """This was chosen; whether it is what was drafted, so that what follows it is known."""
        at = len(self.made)
        self.made.append(token)
        return at < len(self.drafts) and self.drafts[at] == token.id
