"""Sequences that wait and those that run, and the blocks that they hold; `planner.py` decides what a step computes.

Nothing here touches a tensor, and nothing looks at all that wait: an event takes O(log n) of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llmkit.inference.blocks import Blocks, salted
from llmkit.inference.fair import Accounts, Queue, rank
from llmkit.inference.heap import Heap
from llmkit.inference.paths import depths
from llmkit.inference.sequence import Sequence

GPU_TOKENS = 2048
"""Of a step on a GPU: fewer leave it waiting for the host."""


@dataclass(frozen=True)
class Limits:
    """What a step may hold."""

    tokens: int = 256
    """Tokens of one step, over all sequences: who comes meanwhile waits until it ends."""
    sequences: int = 64
    """Sequences that are being answered at once."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Tenant -> its share beside the others'; 1 where it is not named."""

    def __post_init__(self) -> None:
        wrong = [weight for weight in self.weights.values() if not weight > 0]
        if min(self.tokens, self.sequences) < 1 or wrong:
            raise ValueError(f"a step holds something, and weights are above 0: {self}")


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of a sequence, whose keys and values are made in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def tokens(self) -> list[int]:
        """What they are; drafts come last."""
        return self.sequence.text(self.start, self.end)

    @property
    def last(self) -> bool:
        """Whether the next token follows from it."""
        return self.end >= len(self.sequence.tokens)

    @property
    def drafts(self) -> int:
        """How many of its tokens are drafts."""
        return max(0, self.end - max(self.start, len(self.sequence.tokens)))

    @property
    def parents(self) -> tuple[int, ...]:
        """Of drafts that are a tree, the newest token before them its root, the parents of all; nothing of a chain."""
        parents = self.sequence.parents
        return (-1, *(parent + 1 for parent in parents[: self.drafts])) if parents and self.drafts else ()

    @property
    def places(self) -> Iterable[int]:
        """Where each token would stand in the text."""
        parents = self.parents
        return [self.start + depth for depth in depths(parents)] if parents else range(self.start, self.end)


@dataclass
class Step:
    """What is computed together."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Blocks that several held and one goes on to fill: from, to; copied before anything is computed."""
    preempted: list[Sequence] = field(default_factory=list)
    late: list[Sequence] = field(default_factory=list)
    """Their deadlines have passed; whatever they held is given back."""

    @property
    def tokens(self) -> int:
        """Of all chunks."""
        return sum(chunk.end - chunk.start for chunk in self.chunks)


@dataclass
class Counts:
    """What happened since the beginning."""

    preempted: int = 0
    dropped: int = 0
    """Requests whose deadline passed before anything was computed for them: their answers have not parted yet."""
    looked: int = 0
    """Tokens of prompts that were looked for in the cache."""
    hits: int = 0
    """Those of them that were there."""


class Scheduler:
    """Who waits, who runs, and on which blocks."""

    def __init__(self, blocks: Blocks, limits: Limits) -> None:
        self.blocks, self.limits = blocks, limits
        self.version = 0
        """Of the weights: blocks of others are not found."""
        self.accounts = Accounts(limits.weights, 2 * limits.tokens)
        self.fresh, self.back = Queue(self.accounts), Queue(self.accounts)
        """Those for which nothing was computed yet, and those that gave their blocks back."""
        self.running: dict[Sequence, None] = {}
        self.slots = 0
        """Answers that run, counted as `Sequence.width` does."""
        self.held = False
        """Whether those that have not begun wait, whatever room there is."""
        self.paused = False
        """Whether the last step left out next tokens, for another tenant's prompt: the next one does not."""
        self.deadlines: Heap[Sequence] = Heap()
        self.counts = Counts()
        self.came = 0

    def add(self, one: Sequence) -> None:
        """One more is to be answered."""
        self._enter(one)
        self.fresh.push(one)

    def fork(self, one: Sequence, indices: Iterable[int]) -> list[Sequence]:
        """Answers that go on from here, each with a hold of its own on the blocks."""
        made = [one.fork(index) for index in indices]
        for other in made:
            self._enter(other)
            if one not in self.running:
                self.back.push(other)
                continue
            for block in other.blocks:
                self.blocks.hold(block)
            self._run(other, 1)
        if one in self.running:
            self.slots, self.accounts[one].slots = self.slots + 1 - one.width, self.accounts[one].slots + 1 - one.width
        one.width = 1
        return made

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.queued

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self.fresh) + len(self.back)

    @property
    def begun(self) -> int:
        """How many have begun and not ended."""
        return len(self.running) + len(self.back)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """These have ended, or nobody waits for them: their blocks are free."""
        for one in sequences:
            if one in self.running:
                self._stop(one)
            else:
                (self.fresh if one in self.fresh else self.back).drop(one)
            if one in self.deadlines:
                self.deadlines.drop(one)
            self.accounts.leave(one)

    def late(self, now: float) -> list[Sequence]:
        """Those whose deadline has passed; they have ended."""
        late = []
        while (first := self.deadlines.first()) is not None and first[0][0] <= now:
            late.append(first[1])
            self.counts.dropped += not first[1].begun
            self.remove([first[1]])
        return late

    def next(self) -> Sequence | None:
        """The one of those that wait whose turn it is."""
        back, fresh = self.back.first(), None if self.held else self.fresh.first()
        if back is None or fresh is None:
            return fresh if back is None else back
        return min(back, fresh, key=self.turn)

    def turn(self, one: Sequence) -> tuple[float, ...]:
        """The key of whose turn it is: the least served tenant's, then the first of its own."""
        return self.accounts[one].counter, *rank(one)

    def start(self, one: Sequence) -> None:
        """One that waited runs."""
        (self.fresh if one in self.fresh else self.back).drop(one)
        self._run(one, one.width)
        if not one.begun:
            one.begun, one.found = True, one.cached
            self.counts.looked += len(one.tokens)
            self.counts.hits += one.cached

    def preempt(self, one: Sequence) -> None:
        """One that runs gives its blocks back, and is computed again later."""
        self._stop(one)
        self.back.push(one)
        self.counts.preempted += 1

    def salt(self, one: Sequence) -> bytes:
        """What the names of its blocks begin from: whose they are, and of which weights."""
        return salted(one.request.tenant, one.adapter, str(self.version))

    def known(self, one: Sequence) -> None:
        """Takes what the cache has of a sequence; the last token is always computed, since the next follows from it."""
        if not one.names:
            one.names = [self.salt(one)]
        told = one.request.sampling.prompt_logprobs is not None and one.made == 0  # every place is to be computed
        whole = 0 if told else (len(one.tokens) - 1) // self.blocks.size
        one.blocks = self.blocks.share(one.name(whole, self.blocks.size))
        one.cached = len(one.blocks) * self.blocks.size
        one.published = len(one.blocks)

    def rest(self, one: Sequence, rests: bool) -> None:
        """What follows one is known and it waits for others, or it goes on."""
        one.rests = rests
        if one in self.back:
            self.back.drop(one)
            self.back.push(one)

    def give_back(self, one: Sequence) -> None:
        """All of its blocks."""
        self.blocks.release(one.blocks)
        one.blocks, one.cached, one.published = [], 0, 0

    def commit(self, step: Step) -> None:
        """The step is computed: keys and values are there, and full blocks can be found. Drafts are none of this."""
        for chunk in step.chunks:
            chunk.sequence.cached = min(chunk.end, len(chunk.sequence.tokens))
            self._publish(chunk.sequence)

    def moves(self, one: Sequence, path: Iterable[int]) -> list[tuple[int, int]]:
        """From where to where keys and values are to be moved, as block * size + place in it, so that those of the
        drafts of a path come to lie end to end."""
        size = self.blocks.size
        pairs = [(one.cached + draft, one.cached + at) for at, draft in enumerate(path) if draft != at]
        return [(one.slot(source, size), one.slot(target, size)) for source, target in pairs]

    def accept(self, one: Sequence, count: int) -> None:
        """Of the drafts that a step computed `count` have become tokens, and their keys and values lie end to end; what
        was made for the others is gone."""
        one.drafts, one.parents, one.cached = [], [], one.cached + count
        self._publish(one)
        used = -(-one.cached // self.blocks.size)
        self.blocks.release(one.blocks[used:])
        del one.blocks[used:]

    def undo(self, step: Step) -> None:
        """The step failed: what it was to compute is computed again, and all that was and of which no token came."""
        chunked = {chunk.sequence for chunk in step.chunks}
        for one in [one for one in self.running if one in chunked or not (one.waiting or one.rests)]:
            self.preempt(one)

    def forget(self) -> None:
        """The weights are others: nothing of the cache is of use any longer."""
        for one in list(self.running):
            self.preempt(one)
        self.blocks.forget()
        for line in (*self.back.lines.values(), *self.fresh.lines.values()):
            for one in line.tickets:
                one.names = []

    def _enter(self, one: Sequence) -> None:
        one.order, self.came = self.came, self.came + 1
        self.accounts.enter(one)
        if one.request.deadline is not None:
            self.deadlines.push((one.request.deadline,), one)

    def _run(self, one: Sequence, width: int) -> None:
        self.running[one] = None
        self.slots, self.accounts[one].slots = self.slots + width, self.accounts[one].slots + width

    def _stop(self, one: Sequence) -> None:
        del self.running[one]
        self.slots, self.accounts[one].slots = self.slots - one.width, self.accounts[one].slots - one.width
        one.drafts, one.parents = [], []
        self.give_back(one)

    def _publish(self, one: Sequence) -> None:
        full = one.cached // self.blocks.size
        if full <= one.published:
            return
        for index, name in enumerate(one.name(full, self.blocks.size)[one.published :], one.published):
            self.blocks.publish(one.blocks[index], name)
        one.published = full
