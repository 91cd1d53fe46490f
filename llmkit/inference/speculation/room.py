"""Who holds which blocks of a drafter's own cache: those of sequences long not drafted for are taken first."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from llmkit.inference.blocks import Blocks
from llmkit.inference.sequence import Sequence


class Holding(Protocol):
    """What a drafter's cache has of one sequence."""

    blocks: list[int]
    turn: int
    """When it was last drafted for."""

    def clear(self) -> None:
        """Nothing of it is there any longer; its blocks are given back already."""
        ...


H = TypeVar("H", bound=Holding)


class Room(Generic[H]):
    """The blocks of a drafter's cache."""

    def __init__(self, count: int, size: int, made: Callable[[], H]) -> None:
        """`count` blocks of `size` tokens; `made`: what is held of a sequence that is new."""
        self.blocks, self.size, self.made = Blocks(count, size), size, made
        self.held: weakref.WeakKeyDictionary[Sequence, H] = weakref.WeakKeyDictionary()
        self.turn = 0

    def of(self, one: Sequence) -> H:
        """What is held of a sequence; it is given back when that is gone."""
        if one not in self.held:
            held = self.held[one] = self.made()
            weakref.finalize(one, self.leave, held)
        return self.held[one]

    def leave(self, held: H) -> None:
        """Gives back all that is held."""
        self.blocks.release(held.blocks)
        held.blocks = []
        held.clear()

    def reserve(self, held: H, tokens: int) -> bool:
        """Whether there are blocks for so many tokens, of sequences of earlier turns if none are free."""
        need = -(-tokens // self.size) - len(held.blocks)
        if need > 0:
            if not self.free(need):
                return False
            held.blocks += self.blocks.take(need)
        return True

    def free(self, count: int) -> bool:
        """Whether so many blocks are held by nobody, or could be taken from sequences of earlier turns."""
        while count > self.blocks.room:
            old = min(self.held.values(), key=lambda held: (not held.blocks, held.turn), default=None)
            if old is None or not old.blocks or old.turn == self.turn:
                return False
            self.leave(old)
        return True
