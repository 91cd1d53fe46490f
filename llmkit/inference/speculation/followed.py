"""What a draft head's cache has of each sequence: rows of the text that the model's hidden states are known of."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from torch import Tensor

from llmkit.inference.blocks import chain
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.pile import Entry
from llmkit.inference.speculation.room import Room


@dataclass(eq=False)
class Followed:
    """Of one sequence."""

    blocks: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Of each row in the blocks, where in the text its feature stands; some may be left out."""
    at: int = 0
    """The first place after those that were read, or given up."""
    tip: Tensor | None = None
    """What the head made of the row before that place, (H,)."""
    names: list[bytes] = field(default_factory=list)
    """Of its full blocks, after that of the empty prefix."""
    turn: int = 0

    def clear(self) -> None:
        """Nothing is there any longer."""
        self.places, self.tip, self.names = [], None, []

    @property
    def whole(self) -> bool:
        """Whether no place is left out."""
        return not self.places or self.places[-1] == len(self.places) - 1

    def name(self, one: Sequence, count: int, size: int) -> list[bytes]:
        """The names of the first `count` blocks: of the tokens up to the one after each block's last feature, and of
        what else the model's own blocks are named by."""
        if not self.names:
            self.names = [chain(one.names[0], one.tokens[:1])]
        while len(self.names) <= count:
            start = (len(self.names) - 1) * size + 1
            self.names.append(chain(self.names[-1], one.tokens[start : start + size]))
        return self.names[1 : count + 1]


class Following:
    """The sequences in a head's cache. A prefix that others had, or an answer's siblings, is not read again: a prompt
    that the model found in its cache, whose hidden states nobody made now, is known all the same."""

    def __init__(self, count: int, size: int, copy: Callable[[int, int], None]) -> None:
        """`count` blocks of `size` rows; `copy` copies one."""
        self.room, self.copy = Room(count, size, Followed), copy
        self.firsts: WeakValueDictionary[str, Sequence] = WeakValueDictionary()
        """Of requests that several answers are made for, the first."""

    def of(self, one: Sequence, found: Mapping[Sequence, list[Entry]]) -> tuple[Followed, list[Entry]]:
        """What is there of a sequence, and what of `found` is still to be read of it."""
        entries = list(found.get(one, ()))
        if one.index == 0 and one.request.sampling.n > 1:
            self.firsts[one.request.id] = one
        if one not in self.room.held:
            first = self.firsts.get(one.request.id)
            if first is not None and first is not one and first.request is one.request:
                entries = self._forked(first, one, found.get(first, ())) + entries
            elif one.found and one.names:
                self._shared(one)
        held, new = self.room.of(one), list[Entry]()
        for entry in entries:  # a step that was computed again comes twice
            if entry[0] >= (new[-1][0] + 1 if new else held.at):
                new.append(entry)
        return held, new

    def note(self, one: Sequence, entries: Seq[Entry], tip: Tensor) -> None:
        """These are in the cache now; blocks that are full can be found by others from now on."""
        held, size = self.room.of(one), self.room.size
        before = len(held.places) // size
        held.places += [place for place, _ in entries]
        held.at, held.tip = held.places[-1] + 1, tip
        full = len(held.places) // size
        if held.whole and full > before and one.names:
            for index, name in enumerate(held.name(one, full, size)[before:], before):
                self.room.blocks.publish(held.blocks[index], name)

    def _shared(self, one: Sequence) -> None:
        """Blocks of the same prefix, as far as the model found its own."""
        held, size = self.room.of(one), self.room.size
        count = min(one.found // size, (len(one.tokens) - 1) // size)
        held.blocks = self.room.blocks.share(held.name(one, count, size))
        held.places = list(range(len(held.blocks) * size))
        held.at = len(held.places)

    def _forked(self, first: Sequence, one: Sequence, found: Seq[Entry]) -> list[Entry]:
        """An answer goes on from where it parted from the first; what of that is not read yet is its own too."""
        pairs = enumerate(zip(first.tokens, one.tokens, strict=False))
        same = next((at for at, (a, b) in pairs if a != b), min(len(first.tokens), len(one.tokens)))
        source, held, size = self.room.of(first), self.room.of(one), self.room.size
        source.turn = self.room.turn  # it is not what gives way to its copy
        kept = bisect_left(source.places, same - 1)
        whole, rest = divmod(kept, size)
        if rest and self.room.free(1):
            held.blocks = self.room.blocks.take(1)
            self.copy(source.blocks[whole], held.blocks[0])
        else:
            kept = whole * size
        for block in source.blocks[:whole]:
            self.room.blocks.hold(block)
        held.blocks = source.blocks[:whole] + held.blocks
        held.places = source.places[:kept]
        held.at = held.places[-1] + 1 if kept else 0
        return [entry for entry in found if entry[0] < min(same, len(one.tokens) - 1)]
