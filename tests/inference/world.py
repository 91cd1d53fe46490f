"""A scheduler with a store of its own kind: each place of a block holds the digest of all tokens up to it, so that
whoever reads a block that is not of its own prefix is found at once. No tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random

from llmkit.inference.blocks import Blocks, salted
from llmkit.inference.planner import plan
from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Chunk, Limits, Scheduler, Step
from llmkit.inference.sequence import Sequence

EMPTY = 0


def after(before: int, token: int) -> int:
    """The digest of a prefix and one more token."""
    return hash((before, token))


class World:
    """What a model and a server would do around a scheduler, and what must hold of it."""

    def __init__(self, blocks: int = 24, size: int = 4, limits: Limits = Limits(16, 6), seed: int = 0) -> None:
        self.size, self.now = size, 0.0
        self.random = Random(seed)
        self.scheduler = Scheduler(Blocks(blocks, size), limits)
        self.store = [[EMPTY] * size for _ in range(blocks)]
        self.meaning: dict[bytes, int] = {}
        """What the last place of the block of a name holds."""
        self.live: dict[str, list[Sequence]] = {}
        self.ended: Counter[tuple[str, int]] = Counter()
        """Times that each answer has ended."""
        self.begun: dict[str, float] = {}
        self.took: list[int] = []
        """Tokens of each step."""

    def root(self, one: Sequence) -> int:
        """The digest of the empty prefix."""
        return hash((one.request.tenant, one.request.adapter, self.scheduler.version))

    def add(self, request: Request) -> None:
        one = Sequence(request, 0, list(request.prompt), adapter=request.adapter, width=request.sampling.n)
        self.live[request.id] = [one]
        self.scheduler.add(one)

    def abort(self, id: str) -> None:
        sequences = self.live.pop(id)
        for one in sequences:
            self.end(one)
        self.scheduler.remove(sequences)

    def end(self, one: Sequence) -> None:
        for index in range(one.index, one.index + one.width):
            self.ended[one.request.id, index] += 1

    def swap(self) -> None:
        """Other weights, and what runs goes on with them."""
        self.scheduler.version += 1
        self.meaning.clear()
        self.scheduler.forget()

    def step(self, fails: bool = False) -> Step:
        """Plans a step and computes it."""
        step = plan(self.scheduler, self.now)
        for one in step.late:
            self.end(one)
            self.live[one.request.id].remove(one)
            if not self.live[one.request.id]:
                del self.live[one.request.id]
        assert step.tokens <= self.scheduler.limits.tokens
        assert step.chunks or self.scheduler.held or self.scheduler.idle, "nothing moves"
        targets = [target for _, target in step.copies]
        assert len(set(targets)) == len(targets), "two copies of one place"
        for source, target in step.copies:
            self.store[target] = list(self.store[source])
        for chunk in step.chunks:
            self.compute(chunk)
        if fails:
            self.scheduler.undo(step)
            return step
        self.scheduler.commit(step)
        self.took.append(step.tokens)
        for chunk in step.chunks:
            if chunk.last:
                self.grow(chunk.sequence, chunk.drafts)
        return step

    def compute(self, chunk: Chunk) -> None:
        """Reads all that comes before, as attention would, and writes the new places; in a tree what comes before a
        token are its ancestors."""
        one, start, end = chunk.sequence, chunk.start, chunk.end
        digest, blocks = self.root(one), self.scheduler.blocks
        assert start < end <= len(one.blocks) * self.size
        for at, token in enumerate(one.text(0, start)):
            digest = after(digest, token)
            assert self.store[one.blocks[at // self.size]][at % self.size] == digest, "another's block is read"
        made: list[int] = []
        for own, parent in enumerate(chunk.parents or range(-1, end - start - 1)):
            made.append(after(digest if parent < 0 else made[parent], one.text(start + own, start + own + 1)[0]))
            block, place = one.blocks[(start + own) // self.size], (start + own) % self.size
            assert blocks.holders[block] == 1 and blocks.names[block] is None, "a shared block is written"
            self.store[block][place] = made[-1]

    def grow(self, one: Sequence, drafted: int) -> None:
        """The next token of an answer, after as many of its drafts as turned out right."""
        if one.drafts:
            path = self.path(one.parents[:drafted] or range(-1, drafted - 1))
            one.tokens += [one.drafts[at] for at in path]
            moves = self.scheduler.moves(one, path)
            held = [self.store[source // self.size][source % self.size] for source, _ in moves]
            for (_, target), digest in zip(moves, held, strict=True):
                self.store[target // self.size][target % self.size] = digest
            self.scheduler.accept(one, len(path))
        others = self.scheduler.fork(one, range(1, one.width)) if one.width > 1 else []
        self.live[one.request.id] += others
        for each in (one, *others):
            each.tokens.append(self.random.randint(0, 1))
            self.begun.setdefault(each.request.id, self.now)
            if each.made >= each.request.sampling.max_tokens:
                self.finish(each)

    def path(self, parents: Iterable[int]) -> list[int]:
        """Drafts one after the other, as far as they are right."""
        path = [-1]
        while (
            follow := [at for at, parent in enumerate(parents) if parent == path[-1]]
        ) and self.random.random() < 0.7:
            path.append(self.random.choice(follow))
        return path[1:]

    def finish(self, one: Sequence) -> None:
        self.end(one)
        self.scheduler.remove([one])
        self.live[one.request.id].remove(one)
        if not self.live[one.request.id]:
            del self.live[one.request.id]

    def check(self) -> None:
        """What holds after every event."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        held = Counter(block for one in scheduler.running for block in one.blocks)
        assert [held[block] for block in range(blocks.count)] == blocks.holders
        assert set(blocks.free) == {block for block in range(blocks.count) if not held[block]}
        assert blocks.found == {name: block for block, name in enumerate(blocks.names) if name is not None}
        for name, block in blocks.found.items():
            assert self.meaning.setdefault(name, self.store[block][-1]) == self.store[block][-1], "a name of two"
        live = {one for sequences in self.live.values() for one in sequences}
        waiting = live - set(scheduler.running)
        assert len(waiting) == scheduler.queued and not any(one.blocks or one.cached for one in waiting)
        assert scheduler.slots == sum(one.width for one in scheduler.running) <= scheduler.limits.sequences
        assert len(scheduler.deadlines) == sum(one.request.deadline is not None for one in live)
        for one in scheduler.running:
            assert one.names[0] == salted(one.request.tenant, one.request.adapter, str(scheduler.version))
            assert one.published * self.size <= one.cached <= len(one.tokens)
            assert len(set(one.blocks)) == len(one.blocks)
        self.check_accounts(live)

    def check_accounts(self, live: set[Sequence]) -> None:
        accounts = self.scheduler.accounts
        here = Counter(one.request.tenant for one in live)
        slots = Counter[str]()
        for one in self.scheduler.running:
            slots[one.request.tenant] += one.width
        for tenant, account in accounts.accounts.items():
            assert (account.present, account.slots) == (here[tenant], slots[tenant])
            assert account.present or account.counter > accounts.floor or tenant in accounts.ahead
        assert set(here) <= set(accounts.accounts)


def request(
    id: str, prompt: tuple[int, ...], max_tokens: int = 4, n: int = 1, at: float = 0.0, **more: object
) -> Request:
    """One that comes at `at`."""
    return Request(id, prompt, Sampling(max_tokens=max_tokens, n=n), arrived=at, **more)  # type: ignore[arg-type]
