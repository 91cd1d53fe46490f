"""What the next step computes: decided by numbers alone, without tensors.

Every step has a budget of tokens. Answers that are being decoded come first, one token each; what is left goes to
prompts, in chunks. Where blocks run out, the one that came last gives its own back and is computed again later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from llmkit.inference.blocks import Blocks, salted
from llmkit.inference.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """What a step may hold."""

    tokens: int = 512
    """Tokens of one step, over all sequences."""
    sequences: int = 64
    """Sequences that are being answered at once."""


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of a sequence, whose keys and values are made in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def last(self) -> bool:
        """Whether the next token follows from it."""
        return self.end == len(self.sequence.tokens)


@dataclass
class Step:
    """What is computed together."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Blocks that several held and one goes on to fill: from, to; copied before anything is computed."""
    preempted: list[Sequence] = field(default_factory=list)
    late: list[Sequence] = field(default_factory=list)
    """Dropped, since their deadline passed before they began."""

    @property
    def tokens(self) -> int:
        """Of all chunks."""
        return sum(chunk.end - chunk.start for chunk in self.chunks)


class Scheduler:
    """Sequences that wait and those that run."""

    def __init__(self, blocks: Blocks, limits: Limits, salt: Callable[[Sequence], bytes] | None = None) -> None:
        self.blocks, self.limits = blocks, limits
        self.salt = salt or (lambda one: salted(one.request.tenant, one.adapter))
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.came = 0

    def add(self, sequence: Sequence) -> None:
        """One more is to be answered."""
        sequence.order, self.came = self.came, self.came + 1
        sequence.names = [self.salt(sequence)]
        self.waiting.append(sequence)

    def fork(self, one: Sequence, indices: Iterable[int]) -> list[Sequence]:
        """Answers that go on from a running one, each with a hold of its own on the blocks."""
        made = []
        for index in indices:
            other = one.fork(index)
            other.order, self.came = self.came, self.came + 1
            for block in other.blocks:
                self.blocks.hold(block)
            self.running.append(other)
            made.append(other)
        one.width = 1
        return made

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """These have ended, or nobody waits for them: their blocks are free."""
        for one in sequences:
            (self.running if one in self.running else self.waiting).remove(one)
            self._give_back(one)

    def plan(self, now: float) -> Step:
        """What the next step computes."""
        step = Step()
        self._drop_late(step, now)
        budget = self._decode(step, self.limits.tokens)
        self._admit(step, budget)
        return step

    def commit(self, step: Step) -> None:
        """The step is computed: keys and values are there, and full blocks can be found."""
        for chunk in step.chunks:
            one = chunk.sequence
            one.cached = chunk.end
            full = one.cached // self.blocks.size
            for index, name in enumerate(one.name(full, self.blocks.size)[one.published :], one.published):
                self.blocks.publish(one.blocks[index], name)
            one.published = max(one.published, full)

    def _drop_late(self, step: Step, now: float) -> None:
        for one in [one for one in self.waiting if one.made == 0]:
            if one.request.deadline is not None and now >= one.request.deadline:
                self.waiting.remove(one)
                step.late.append(one)

    def _decode(self, step: Step, budget: int) -> int:
        """Those that run, in the order in which they came; gives what is left of the budget."""
        for one in sorted(self.running, key=_rank):
            if one not in self.running or not budget:
                continue
            end = min(one.cached + budget, len(one.tokens))
            if self._reserve(step, one, end):
                step.chunks.append(Chunk(one, one.cached, end))
                budget -= end - one.cached
        return budget

    def _reserve(self, step: Step, one: Sequence, end: int) -> bool:
        """Blocks for the first `end` tokens, of those that came later if none are free; whether it has them."""
        while self._missing(one, end) > self.blocks.room:
            victim = max(self.running, key=_rank)
            if any(chunk.sequence is victim for chunk in step.chunks):
                return False
            self._preempt(step, victim)
            if victim is one:
                return False
        self._own(step, one)
        one.blocks += self.blocks.take(self._missing(one, end))
        return True

    def _missing(self, one: Sequence, end: int) -> int:
        """Blocks that the first `end` tokens still need; one that others hold too is not written to."""
        return max(0, -(-end // self.blocks.size) - len(one.blocks)) + self._shared(one)

    def _shared(self, one: Sequence) -> bool:
        at = one.cached // self.blocks.size
        return at < len(one.blocks) and self.blocks.holders[one.blocks[at]] > 1

    def _own(self, step: Step, one: Sequence) -> None:
        """Gives a sequence a copy of the block that it goes on to fill, if others hold it."""
        if self._shared(one):
            at = one.cached // self.blocks.size
            old, new = one.blocks[at], self.blocks.take(1)[0]
            step.copies.append((old, new))
            self.blocks.release([old])
            one.blocks[at] = new

    def _preempt(self, step: Step, one: Sequence) -> None:
        self.running.remove(one)
        self._give_back(one)
        self.waiting.append(one)
        step.preempted.append(one)

    def _give_back(self, one: Sequence) -> None:
        self.blocks.release(one.blocks)
        one.blocks, one.cached, one.published = [], 0, 0

    def _admit(self, step: Step, budget: int) -> None:
        """Those that wait, as long as there is budget and room."""
        for one in sorted(self.waiting, key=_rank):
            full = sum(other.width for other in self.running) + one.width > self.limits.sequences
            if not budget or full or step.preempted:
                return
            held = self._known(one)
            end = min(one.cached + budget, len(one.tokens))
            if self._missing(one, end) > self.blocks.room:
                self._give_back(one)
                return
            one.blocks += self.blocks.take(self._missing(one, end))
            one.found = held if one.made == 0 else one.found
            self.waiting.remove(one)
            self.running.append(one)
            step.chunks.append(Chunk(one, one.cached, end))
            budget -= end - one.cached

    def _known(self, one: Sequence) -> int:
        """Takes what the cache has of a sequence; the last token is always computed, since the next follows from it."""
        told = one.request.sampling.prompt_logprobs is not None and one.made == 0  # every place is to be computed
        whole = 0 if told else (len(one.tokens) - 1) // self.blocks.size
        one.blocks = self.blocks.share(one.name(whole, self.blocks.size))
        one.cached = len(one.blocks) * self.blocks.size
        one.published = len(one.blocks)
        return one.cached


def _rank(one: Sequence) -> tuple[int, int]:
    return one.request.priority, one.order
