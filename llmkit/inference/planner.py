"""What the next step computes: decided by numbers alone, without tensors.

Every step has a budget of tokens. Answers that are being made get their next token, and half of the budget is kept for
prompts while any wait; these are cut into chunks, the least served tenant's first. Where one tenant floods, that is has
more here than all others together, its steps have half of the budget while others are about: one that comes waits until
the step in flight ends. A prompt whose tenant was served less than those who answer, and asks for less, has the whole
budget, and next tokens of one who floods wait for it, in no two steps in a row. Where blocks run out, or one who is
below its share finds no place, the least entitled give theirs back and are computed again later. Of those that run, the
one of the least `priority` number that came first never does, so that it ends whatever comes.
"""

from __future__ import annotations

from collections.abc import Callable

from llmkit.inference.fair import Account, rank
from llmkit.inference.scheduler import Chunk, Scheduler, Step
from llmkit.inference.sequence import Sequence


def plan(scheduler: Scheduler, now: float) -> Step:
    """The next step; `now` is on the clock of deadlines."""
    late = scheduler.late(now)
    scheduler.accounts.rise([*scheduler.running, *filter(None, [scheduler.next()])], now)
    step = Planner(scheduler).plan()
    if not step.chunks and scheduler.next() is not None:  # all that run wait for one that has no room beside them
        for one in list(scheduler.running):
            scheduler.preempt(one)
        step = Planner(scheduler).plan()
    step.late = late
    return step


class Planner:
    """Makes one step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.blocks, self.limits = scheduler, scheduler.blocks, scheduler.limits
        self.step = Step()
        able = [one for one in scheduler.running if one.waiting]
        self.first = min(able, key=rank, default=None)
        self.order = sorted(scheduler.running, key=lambda one: (one is not self.first, *scheduler.turn(one)))
        """Those that run, the most entitled first."""
        self.chunked: set[Sequence] = set()
        self.ready: set[Sequence] = set()
        """Those that have blocks for their next token."""
        self.most = self._most()
        """Tokens of the step."""

    def plan(self) -> Step:
        """Blocks for the next tokens; then prompts, who may take another's place; then the next tokens themselves."""
        if self.first is not None and self.first.reads:
            self._reserve(self.first, min(self.first.cached + self.most, self.first.length))
        for one in self.order:
            waits = one in self.scheduler.running and one.waiting and not one.reads
            if waits and self._reserve(one, len(one.tokens)):
                self.ready.add(one)
        yields = self._prompts()
        ready = [one for one in self.order if one in self.ready and not self._pauses(one, yields)]
        for others, one in zip(range(len(ready) - 1, -1, -1), ready, strict=True):
            if self._left():  # the others have their next tokens before a draft of this one is looked at
                self._chunk(one, self._drafted(one, one.cached + max(1, self._left() - others)))
        self.scheduler.paused = not yields <= self.chunked
        return self.step

    def _pauses(self, one: Sequence, yields: set[Sequence]) -> bool:
        return one in yields and self.scheduler.accounts.floods(one)

    def _drafted(self, one: Sequence, most: int) -> int:
        """Blocks for drafts beside a next token, which has its own: of those that nobody wants. Where they end."""
        room = (len(one.blocks) + self.blocks.room) * self.blocks.size
        end = min(one.length, most, room)
        self._own(one, end)
        return end

    def _most(self) -> int:
        """All that a step may have, or half of it: one that comes waits until the step ends, and so, while several
        tenants are about, the steps of one who floods are short. The prompt of another is not cut for that."""
        accounts, half = self.scheduler.accounts, max(1, self.limits.tokens // 2)
        if not accounts.several or not any(accounts.floods(one) for one in self.order):
            return self.limits.tokens
        ahead = self._ahead([one for one in self.order if one.reads], False)
        if ahead is None or (accounts.floods(ahead) and accounts[ahead].present > 1):
            return half
        return min(self.limits.tokens, max(half, ahead.waiting))

    def _left(self) -> int:
        return self.most - self.step.tokens

    def _chunk(self, one: Sequence, end: int) -> None:
        self.step.chunks.append(Chunk(one, one.cached, end))
        self.chunked.add(one)
        self.scheduler.accounts.charge(one, end)

    def _prompts(self) -> set[Sequence]:
        """Chunks of prompts, of those that run and of those that wait, while there is budget and room; whose next
        tokens come after them."""
        reading = [one for one in self.order if one.reads and one in self.scheduler.running]
        full = bool(self.step.preempted)  # who gave way in this step would come back in it
        ahead = self._ahead(reading, full)
        yields = set() if ahead is None else {one for one in self.ready if self._yields(one, ahead)}
        budget = self._budget(yields)
        while budget > 0:
            one = self._ahead(reading, full)
            if one is None or self._holds_up(one):
                break
            if one not in reading:
                full = not self._admit(one, budget)
                budget -= 0 if full else self.step.chunks[-1].end - self.step.chunks[-1].start
                continue
            reading.remove(one)
            if one in self.scheduler.running:
                budget -= self._read(one, budget)
        return yields if ahead in self.chunked else set()

    def _ahead(self, reading: list[Sequence], full: bool) -> Sequence | None:
        """Whose prompt is next: of one that reads, or, if there may be a place for it, of one that waits."""
        waits = None if full else self.scheduler.next()
        return min([*reading, *filter(None, [waits])], key=self.scheduler.turn, default=None)

    def _budget(self, yields: set[Sequence]) -> int:
        """Tokens of the step for prompts: what next tokens leave that do not yield, half at least."""
        kept = sum(one.waiting for one in self.ready - yields)
        return self.most - min(kept, self.most - self.most // 2)

    def _yields(self, one: Sequence, to: Sequence) -> bool:
        """Whether its tenant asks for more, and was served more, than the one whose prompt is next: else a flood of
        answers makes two steps of what is one alone. Not twice in a row, so that answers go on."""
        accounts = self.scheduler.accounts
        more = accounts[one].counter > accounts[to].counter and accounts.asks(one) > accounts.asks(to)
        return more and not self.scheduler.paused

    def _holds_up(self, one: Sequence) -> bool:
        """Whether its tenant, which floods, would make a step longer in which another's prompt is."""
        accounts = self.scheduler.accounts
        if accounts.here == 1 or not accounts.floods(one):
            return False
        return any(accounts[chunk.sequence] is not accounts[one] for chunk in self.step.chunks)

    def _read(self, one: Sequence, budget: int) -> int:
        """A chunk of one that runs, as far as there is room; how many tokens it has."""
        room = (len(one.blocks) + self.blocks.room) * self.blocks.size
        end = min(one.cached + budget, one.length, room)
        if end <= one.cached or self._missing(one, end) > self.blocks.room:
            return 0
        self._own(one, end)
        self._chunk(one, end)
        return end - one.cached

    def _admit(self, one: Sequence, budget: int) -> bool:
        """One that waits runs, if there is a place for it."""
        self.scheduler.known(one)
        end = min(one.cached + budget, one.length)
        if one in self.step.preempted or not self._place(one, end):
            self.scheduler.give_back(one)
            return False
        self.scheduler.start(one)
        self._own(one, end)
        self._chunk(one, end)
        return True

    def _place(self, one: Sequence, end: int) -> bool:
        """Whether there is room for its answers and its first `end` tokens, or others have given it.

        Those that run are left a block each to go on with.
        """
        while True:
            if self.scheduler.slots + one.width > self.limits.sequences:
                victim = self._over(one, one.width, self.limits.sequences, lambda account: account.slots)
            elif self._missing(one, end) + len(self.scheduler.running) > self.blocks.room:
                victim = self._over(one, len(one.blocks) + self._missing(one, end), self.blocks.count, self._held)
            else:
                return True
            if victim is None:
                return False
            self._preempt(victim)

    def _over(self, one: Sequence, need: int, of: int, has: Callable[[Account], int]) -> Sequence | None:
        """Who gives way: the least entitled of a tenant that has more than its share of what `one`'s has less of, or of
        its own tenant one of a greater `priority` number."""
        accounts = self.scheduler.accounts
        below = has(accounts[one]) + need <= accounts.share(one, of)
        for other in reversed(self.order):
            if other is self.first or other in self.chunked or other not in self.scheduler.running:
                continue
            if accounts[other] is accounts[one]:
                gives = other.request.priority > one.request.priority
            else:
                gives = below and has(accounts[other]) > accounts.share(other, of)
            if gives:
                return other
        return None

    def _held(self, account: Account) -> int:
        """Blocks that a tenant's sequences hold; those that several hold count for each."""
        running = self.scheduler.running
        return sum(len(one.blocks) for one in running if self.scheduler.accounts[one] is account)

    def _reserve(self, one: Sequence, end: int) -> bool:
        """Blocks for the first `end` tokens, of the least entitled if none are free; whether it has them."""
        while self._missing(one, end) > self.blocks.room:
            victim = next(other for other in reversed(self.order) if other in self.scheduler.running)
            self._preempt(victim)
            if victim is one:
                return False
        self._own(one, end)
        return True

    def _missing(self, one: Sequence, end: int) -> int:
        """Blocks that the first `end` tokens still need; one that others hold too is not written to."""
        return max(0, -(-end // self.blocks.size) - len(one.blocks)) + self._shared(one)

    def _shared(self, one: Sequence) -> bool:
        at = one.cached // self.blocks.size
        return at < len(one.blocks) and self.blocks.holders[one.blocks[at]] > 1

    def _own(self, one: Sequence, end: int) -> None:
        """Takes the blocks that are missing, and a copy of the one that it goes on to fill if others hold it."""
        taken = self.blocks.take(self._missing(one, end))
        if self._shared(one):
            at, new = one.cached // self.blocks.size, taken.pop()
            self.step.copies.append((one.blocks[at], new))
            self.blocks.release([one.blocks[at]])
            one.blocks[at] = new
        one.blocks += taken

    def _preempt(self, one: Sequence) -> None:
        held = set(one.blocks)
        self.step.copies = [copy for copy in self.step.copies if copy[1] not in held]
        self.ready.discard(one)
        self.scheduler.preempt(one)
        self.step.preempted.append(one)
