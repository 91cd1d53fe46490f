"""Who drafts, as the engine sees them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from llmkit.inference.runner import Rows
from llmkit.inference.scheduler import Chunk
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.most import MOST
from llmkit.inference.steer import Steer


@dataclass(frozen=True)
class Ask:
    """A sequence, and how much of what may follow it is wanted."""

    sequence: Sequence
    count: int
    """Drafts one after the other at most."""
    steer: Steer
    """What its next token is chosen by; nothing of it is changed."""
    nodes: int = MOST
    """Drafts of a tree at most."""


@dataclass
class Draft:
    """What may follow a sequence."""

    tokens: list[int] = field(default_factory=list)
    sureness: list[int] = field(default_factory=list)
    """Of each token the class that the drafter puts it in: how often those of a class are right is counted."""
    parents: list[int] = field(default_factory=list)
    """Of each token the earlier one that it follows, -1 for the newest of the sequence; none: each follows the one
    before. Those that follow one token differ."""


class Drafter(Protocol):
    """Drafts of what follows. They need not be right, and never change what is chosen."""

    classes: int
    """Of sureness, from the least sure."""
    free: bool
    """Whether drafting takes next to no time, so that it is worth it where nothing may come of it."""

    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        """One for each."""
        ...


@runtime_checkable
class Watching(Protocol):
    """A drafter that reads what the model itself made of a step."""

    def see(self, chunks: Seq[Chunk], rows: Seq[Rows]) -> None:
        """These were computed, in this order; nothing is chosen yet. `rows`: of each the logits after its newest token
        and after its drafts, if the next token follows from it."""
        ...


@runtime_checkable
class Reading(Protocol):
    """A drafter that reads texts, which takes long only where much came at once: a prompt."""

    def read(self, asks: Seq[Ask]) -> None:
        """Reads what is long before it drafts for these; how long that takes says nothing of the next drafts."""
        ...
