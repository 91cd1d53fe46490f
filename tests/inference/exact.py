"""Random schedules of an engine whose logits are kept: what a request gets beside others is what it gets alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmkit.inference.blocks import Blocks
from llmkit.inference.check import Facts
from llmkit.inference.engine import Engine
from llmkit.inference.request import Request
from llmkit.inference.runner import Runner
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Limits
from llmkit.inference.text import Texts
from llmkit.models.attend import install
from llmkit.models.decoder import Decoder
from llmkit.models.paged import BlockStore
from tests.conftest import make_tokenizer

Place = tuple[str, int, int]
"""A request, which of its answers, and after how many tokens."""


class Kept(Runner):
    """Keeps the logits after each token that was the last of its sequence."""

    seen: dict[Place, Tensor]
    steps: int = 0
    most: int = 0

    def run(self, chunks: Any, whole: Any) -> list[Tensor]:
        made = super().run(chunks, whole)
        self.steps, self.most = self.steps + 1, max(self.most, len(chunks))
        for chunk, logits in zip(chunks, made, strict=True):
            if chunk.last:
                place = (chunk.sequence.request.id, chunk.sequence.index, chunk.end)
                before = self.seen.setdefault(place, logits[-1].clone())
                assert before.equal(logits[-1]), f"{place} differs from what it was before a preemption"
        return made


@dataclass(frozen=True)
class Seen:
    """What happened in a schedule."""

    compared: int
    """Logits of one place each."""
    preempted: int
    hits: int
    """Tokens that were found in the cache."""
    together: int
    """Sequences of the fullest step."""


class Trial:
    """A model, and what its requests get alone."""

    def __init__(self, model: Any, exact: bool = False, size: int = 4) -> None:
        self.decoder, self.size = Decoder(model, exact=exact), size
        self.words = len(model.get_output_embeddings().weight)
        self.solo: dict[str, dict[Place, Tensor]] = {}

    def engine(self, blocks: int, tokens: int, sequences: int) -> tuple[Engine, Kept]:
        store = BlockStore(blocks, self.size)
        runner = Kept(self.decoder, store)
        runner.seen = {}

        facts = Facts(self.words, blocks * self.size, ())
        numbers = Blocks(blocks, self.size)
        return Engine(runner, numbers, Limits(tokens, sequences), facts, Texts(make_tokenizer()), store.copy), runner

    def alone(self, request: Request) -> dict[Place, Tensor]:
        """In an engine of its own, its prompt in one piece; answers one after the other."""
        if request.id not in self.solo:
            engine, runner = self.engine(256, 1024, max(1, request.sampling.n))
            engine.add(request)
            while not engine.idle:
                engine.step()
            self.solo[request.id] = runner.seen
        return self.solo[request.id]

    def check(self, seed: int, requests: list[Request]) -> Seen:
        """One random schedule of them."""
        drawn = random.Random(seed)
        wide = max(r.sampling.n for r in requests)
        tight = max(-(-(len(r.prompt) + r.sampling.max_tokens) // self.size) * r.sampling.n for r in requests)
        blocks = drawn.choice([tight, tight + 3, 4 * tight])
        engine, runner = self.engine(blocks, drawn.choice([2, 7, 16, 33, 200]), drawn.choice([wide, 4, 16]) + wide)
        waiting, gone = list(requests), set()
        drawn.shuffle(waiting)
        while waiting or not engine.idle:
            for _ in range(drawn.choice([0, 1, 1, 3])):
                if waiting:
                    engine.add(waiting.pop())
            if drawn.random() < 0.03 and not engine.idle:
                left = drawn.choice(requests).id
                gone.add(left)
                engine.abort(left)
            engine.step()
        assert engine.scheduler.blocks.room == blocks
        for request in requests:
            for place, logits in self.alone(request).items():
                if place in runner.seen:
                    assert runner.seen[place].equal(logits), f"{place} in schedule {seed}"
                else:
                    assert request.id in gone, f"{place} was never made"
        return Seen(len(runner.seen), engine.stats().preempted, engine.stats().hits, runner.most)


def ready(model: Any) -> Any:
    """With our attention."""
    install(model.eval(), "auto")
    return model


def some(words: int, seed: int, count: int, longest: int, made: int) -> list[Request]:
    """Requests, several of which begin alike, of one or several answers, greedy or drawn."""
    drawn = random.Random(seed)
    shared = [drawn.randrange(words) for _ in range(longest // 2)]
    requests = []
    for at in range(count):
        own = [drawn.randrange(words) for _ in range(drawn.randint(1, longest - len(shared)))]
        prompt = tuple(shared[: drawn.choice([0, len(shared)])] + own)
        how = Sampling(
            temperature=drawn.choice([0.0, 1.0]), seed=at, n=drawn.choice([1, 1, 2]), max_tokens=drawn.randint(1, made)
        )
        requests.append(Request(f"{seed}-{at}", prompt, how))
    return requests
