"""The scheduler under any order of events: nothing leaks, nobody reads another's block, and every answer ends once."""

from __future__ import annotations

from random import Random

import pytest

from llmkit.inference.scheduler import Limits
from tests.inference.world import World, request

PREFIXES = [tuple((i * 7 + at) % 5 for at in range(9)) for i in range(3)]


class Fuzz:
    """Draws events."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        tokens, sequences = self.random.choice([(16, 6), (5, 3), (40, 8), (2, 4), (1, 2)])
        weights = {"b": self.random.choice([1.0, 3.0])}
        self.world = World(self.random.choice([12, 16, 40]), 4, Limits(tokens, sequences, weights), seed)
        self.made = 0
        self.answers: dict[tuple[str, int], int] = {}
        """How often each must end: once."""

    def event(self) -> None:
        self.random.choices(
            [
                self.submit,
                self.step,
                self.abort,
                self.pass_by,
                self.swap,
                self.draft,
                self.preempt,
                self.fail,
                self.hold,
            ],
            [20, 50, 4, 5, 0.3, 6, 2, 1, 1],
        )[0]()

    def submit(self) -> None:
        if len(self.world.live) > 40:
            return self.step()
        draw, id = self.random, str(self.made)
        self.made += 1
        tail = tuple(draw.randint(0, 4) for _ in range(draw.randint(1, 14)))
        prompt = (draw.choice(PREFIXES) if draw.random() < 0.6 else ()) + tail
        n = draw.randint(1, self.world.scheduler.limits.sequences) if draw.random() < 0.2 else 1
        deadline = self.world.now + draw.uniform(0, 30) if draw.random() < 0.2 else None
        more = {"tenant": draw.choice("abc"), "adapter": draw.choice(["", "x"]), "deadline": deadline}
        self.world.add(request(id, prompt, draw.randint(1, 12), n, priority=draw.choice([0, 0, 1]), **more))
        self.answers |= {(id, index): 1 for index in range(n)}
        return None

    def step(self) -> None:
        self.world.now += 1.0
        self.world.step()

    def fail(self) -> None:
        self.world.step(fails=True)

    def abort(self) -> None:
        if self.world.live:
            self.world.abort(self.random.choice(list(self.world.live)))

    def pass_by(self) -> None:
        self.world.now += self.random.uniform(0, 10)

    def swap(self) -> None:
        self.world.swap()

    def hold(self) -> None:
        self.world.scheduler.held = not self.world.scheduler.held

    def draft(self) -> None:
        for one in self.world.scheduler.running:
            room = one.request.sampling.max_tokens - one.made - 1
            if one.waiting == 1 and room > 0:
                one.drafts = [self.random.randint(0, 1) for _ in range(self.random.randint(1, min(5, room)))]
                tree = [self.random.randint(-1, at - 1) for at in range(len(one.drafts))]
                one.parents = self.random.choice([[], tree])

    def preempt(self) -> None:
        if self.world.scheduler.running:
            self.world.scheduler.preempt(self.random.choice(list(self.world.scheduler.running)))

    def drain(self) -> None:
        """Whatever is there ends, in steps that its tokens bound."""
        self.world.scheduler.held = False
        steps = 0
        while self.world.live:
            self.step()
            self.world.check()
            steps += 1
            assert steps < 40 * 12 * 40, "somebody never ends"


def run(seed: int, events: int) -> Fuzz:
    fuzz = Fuzz(seed)
    for _ in range(events):
        fuzz.event()
        fuzz.world.check()
    fuzz.drain()
    blocks = fuzz.world.scheduler.blocks
    assert blocks.room == blocks.count and fuzz.world.scheduler.idle
    assert fuzz.world.ended == fuzz.answers
    return fuzz


@pytest.mark.parametrize("seed", range(2, 8))
def test_nothing_leaks_whatever_happens(seed: int) -> None:
    fuzz = run(seed, 500)
    counts = fuzz.world.scheduler.counts
    assert fuzz.made > 30 and counts.preempted and counts.hits  # what it is about took place


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_nothing_leaks_in_many_events(seed: int) -> None:
    run(seed, 2000)
