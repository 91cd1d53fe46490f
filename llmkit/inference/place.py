"""Where the next token of an answer is chosen, and those after it as long as they are what was drafted.

Drafts are looked at one after another, each with the law that the tokens before it make, so that what is chosen is what
would be chosen without them (sample and match): the likeliest token, or the one that the number of the place draws. Of
a tree of drafts, the walk goes on at the one that follows here and is what was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from llmkit.inference.paths import next_of
from llmkit.inference.request import Finish, Request, RequestError, Token
from llmkit.inference.runner import Rows
from llmkit.inference.sequence import Sequence


class Place:
    """The end of a sequence in one step."""

    def __init__(self, sequence: Sequence, rows: Rows, drafts: Seq[int] = (), parents: Seq[int] = ()) -> None:
        """`rows`: logits after its newest token and after each of `drafts`, at the end of those of its chunk;
        `parents`: of each draft the earlier one that it follows, -1 for the newest token, or nothing for a chain."""
        self.sequence, self.rows, self.drafts, self.parents = sequence, rows, drafts, parents
        self.made: list[Token] = []
        """What was chosen so far."""
        self.path: list[int] = []
        """The drafts that were."""
        self.finish: Finish | None = None
        """How its answer ended here, if it did."""
        self.stopped: int | str | None = None
        """And what the request named that ended it."""
        self.fault: RequestError | None = None
        """Why nothing can be chosen."""

    @property
    def request(self) -> Request:
        """Whose it is."""
        return self.sequence.request

    @property
    def logits(self) -> Tensor:
        """(V,): of what follows."""
        return self.rows[len(self.rows) - len(self.drafts) + (self.path[-1] if self.path else -1)]

    @property
    def kept(self) -> list[int]:
        """The drafts whose keys and values are of use: all of `path` but a text's last token."""
        return self.path[: max(0, len(self.made) - 1)]

    def take(self, token: Token) -> bool:
        """This was chosen; whether it is what was drafted, so that what follows it is known."""
        self.made.append(token)
        at = next_of(self.drafts, self.parents, self.path[-1] if self.path else -1, token.id)
        if at >= 0:
            self.path.append(at)
        return at >= 0
