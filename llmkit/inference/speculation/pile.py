"""Hidden states of the model that a drafter has not read yet, and which tokens of which sequences they are of."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.inference.paths import next_of
from llmkit.inference.scheduler import Chunk
from llmkit.inference.sequence import Sequence

Entry = tuple[int, int]
"""The place of a token in its sequence, and its row among all that is taken from the pile."""


@dataclass(frozen=True)
class Seen:
    """Tokens [start, known) of a sequence, then drafts, as a step computed them."""

    sequence: Sequence
    start: int
    known: int
    row: int
    """Of the first of them."""
    drafts: list[int]
    parents: list[int]

    def entries(self) -> list[Entry]:
        """Those whose next token is known; of drafts the path that came."""
        tokens, first = self.sequence.tokens, max(self.start, self.sequence.before - 1)
        made = [(at, self.row + at - self.start) for at in range(first, min(self.known, len(tokens) - 1))]
        last, after = -1, self.row + self.known - self.start
        for place in range(self.known, len(tokens) - 1):
            last = next_of(self.drafts, self.parents, last, tokens[place])
            if last < 0:
                break
            made.append((place, after + last))
        return made


class Pile:
    """What was seen since it was last taken."""

    def __init__(self, states: Callable[[], list[Tensor]]) -> None:
        """`states`: of the newest step, (N, H) of each layer that is read."""
        self.states = states
        self.clear()

    def clear(self) -> None:
        """Nothing of it is wanted."""
        self.seen: list[Seen] = []
        self.held: list[list[Tensor]] = []
        self.rows = self.prompts = 0
        """All, and those of them that lie before the newest token of a text in its step."""

    def add(self, chunks: Seq[Chunk]) -> None:
        """A step was computed; what of it is right is known when the next one is."""
        self.held.append(self.states())
        for chunk in chunks:
            one, count = chunk.sequence, chunk.drafts
            if one.request.sampling.beams == 1:  # others are never drafted for
                drafts, parents = one.drafts[:count], one.parents[:count]
                self.seen.append(Seen(one, chunk.start, chunk.end - count, self.rows, drafts, parents))
            self.rows += chunk.end - chunk.start
            self.prompts += max(0, chunk.end - count - chunk.start - 1)

    def take(self) -> tuple[dict[Sequence, list[Entry]], list[Tensor]]:
        """What became text of each sequence, in order, and the states (rows, H) of each layer."""
        found: dict[Sequence, list[Entry]] = {}
        for seen in self.seen:
            found.setdefault(seen.sequence, []).extend(seen.entries())
        layers = [step[0] if len(step) == 1 else torch.cat(step) for step in zip(*self.held, strict=True)]
        self.clear()
        return found, layers
