"""An engine in random schedules: what is made of requests with drafts, and one after the other without."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from llmkit.cli.speculation.tiny import letters, near
from llmkit.inference.adapters import Adapters
from llmkit.inference.blocks import Blocks
from llmkit.inference.check import Facts
from llmkit.inference.engine import Engine
from llmkit.inference.gauges import Stats
from llmkit.inference.request import Event, Request
from llmkit.inference.runner import Runner
from llmkit.inference.scheduler import Limits
from llmkit.inference.speculation.drafter import Drafter
from llmkit.inference.speculation.source import Source
from llmkit.inference.speculation.speculator import Speculator
from llmkit.inference.text import Texts
from llmkit.models.decoder import Decoder
from llmkit.models.paged import BlockStore

ENDS = (3, 9)
SIZE = 4
"""Tokens of a block."""
WIDE = 400
"""Blocks where nobody is to be preempted."""
Who = Drafter | tuple[Drafter, ...]
"""One that drafts, or several whose drafts are one tree."""
Answer = tuple[str, int]
"""A request's name, and which of its answers."""


@dataclass(frozen=True)
class Schedule:
    """How requests come, and what they find."""

    seed: int
    blocks: int = WIDE
    tokens: int = 1024
    """Of a step: prompts are read in chunks of it."""
    sequences: int = 4
    coming: float = 1.0
    """How likely one more comes before a step."""
    drafts: int = 4
    """Of one sequence in a step."""
    force: float = 0.0
    """How likely one that runs is preempted after a step."""
    held: int = 200
    """Blocks of a drafter's own cache: where they are few, sequences push each other out."""

    @classmethod
    def drawn(cls, seed: int, width: int = 1) -> Schedule:
        """One of all kinds: `width` answers of a request run at once."""
        draw = random.Random(seed)
        blocks, tokens = draw.choice([30, 60, WIDE]), draw.choice([7, 16, 64])
        sequences, coming = max(width, draw.choice([1, 4, 9, 16])), draw.choice([0.2, 0.6, 1.0])
        drafts, force = draw.randint(1, 8), draw.choice([0.0, 0.1])
        return cls(seed, blocks, tokens, sequences, coming, drafts, force, draw.choice([12, 200]))


@dataclass
class Made:
    """What came of requests."""

    events: dict[Answer, list[Event]] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0
    hits: int = 0
    """Tokens of prompts that were found in the cache."""
    leaked: int = 0
    """Blocks that nobody gave back."""

    def see(self, stats: Stats) -> None:
        """What the engine counted."""
        self.drafted, self.accepted = stats.drafted, stats.accepted
        self.preempted, self.hits = stats.preempted, stats.hits

    def told(self) -> dict[Answer, Any]:
        """All that a client sees, whatever the steps."""
        return {
            key: (
                [(t.id, t.logprob, t.sampling_logprob, dict(t.top)) for event in events for t in event.tokens],
                [(event.finish, event.stopped, event.why) for event in events if event.finish is not None],
                [event.prompt for event in events if event.prompt],
            )
            for key, events in self.events.items()
        }

    def tokens(self, key: Answer) -> list[int]:
        """Those of an answer."""
        return [token.id for event in self.events.get(key, ()) for token in event.tokens]


class Trial:
    """A model, one that is near it, and engines over the first."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
        size: int = SIZE,
        ends: Seq[int] = ENDS,
    ) -> None:
        """`dtype`: of the cache; `size`: tokens of its blocks; `ends`: what ends a text by itself."""
        self.model, self.dtype, self.size, self.ends = model, dtype, size, tuple(ends)
        self.tokenizer = letters() if tokenizer is None else tokenizer
        self.decoder = exactly(model)
        self.words = self.decoder.words
        self.texts = Texts(self.tokenizer)
        self.adapters: Adapters | None = None

    @cached_property
    def near(self) -> Decoder:
        """A model that is often right about this one."""
        return exactly(near(self.model))

    def engine(self, schedule: Schedule, who: Who | None = None) -> Engine:
        """An engine of its own."""
        store = BlockStore(schedule.blocks, self.size, self.dtype)
        sources = [
            Source(one, schedule.drafts) for one in (who if isinstance(who, tuple) else (who,)) if one is not None
        ]
        speculator = Speculator(sources, fixed=True) if sources else None
        facts = Facts(self.words, schedule.blocks * self.size, self.ends)
        blocks, limits = Blocks(schedule.blocks, self.size), Limits(schedule.tokens, schedule.sequences)
        runner = Runner(self.decoder, store)
        return Engine(runner, blocks, limits, facts, self.texts, store.copy, self.adapters, speculator, store.move)

    def plain(self, requests: Seq[Request]) -> Made:
        """One after the other, without drafts."""
        return self.run(requests, Schedule(0), None, together=False)

    def run(self, requests: Seq[Request], schedule: Schedule, who: Who | None, together: bool = True) -> Made:
        """Side by side as the schedule says, or one after the other."""
        return self.through(self.engine(schedule, who), requests, schedule, together)

    def through(
        self, engine: Engine, requests: Seq[Request], schedule: Schedule = Schedule(0), together: bool = True
    ) -> Made:
        """What an engine of this trial makes of requests."""
        drawn, made = random.Random(schedule.seed), Made()
        waiting, running = list(requests), engine.scheduler.running
        while waiting or not engine.idle:
            if waiting and (engine.idle or (together and drawn.random() < schedule.coming)):
                engine.add(waiting.pop(0))
            for event in engine.step():
                made.events.setdefault((event.request, event.index), []).append(event)
            if running and drawn.random() < schedule.force:
                engine.scheduler.preempt(drawn.choice(list(running)))
        made.see(engine.stats())
        made.leaked = engine.scheduler.blocks.count - engine.scheduler.blocks.room
        return made


def exactly(model: Any) -> Decoder:
    """A model of which no row depends on those beside it: with torch's own products where nothing is compiled.

    Raises:
        ModelError: it cannot be run so.
    """
    made = Decoder(model)
    return made if made.exact else Decoder(model, exact=True)
