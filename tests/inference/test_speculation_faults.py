"""A drafter that fails is given up, with one line and a count, and no answer is the worse for it; one that is not worth
its time is asked seldom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from llmkit_kernels.build import lacks

from llmkit.cli.speculation.drafters import DRAFTERS, head, small
from llmkit.cli.speculation.tiny import lively
from llmkit.cli.speculation.trial import Schedule, Trial
from llmkit.cli.speculation.ways import asked
from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling
from llmkit.inference.sequence import Sequence as Text
from llmkit.inference.speculation.automaton import Automaton
from llmkit.inference.speculation.branched import Branched
from llmkit.inference.speculation.corpus import Corpus, indexed
from llmkit.inference.speculation.drafter import Ask, Draft
from llmkit.inference.speculation.model import Small
from llmkit.inference.speculation.ngram import Lookup
from llmkit.inference.speculation.recycled import Recycled
from llmkit.inference.speculation.retrieval import Retrieval
from llmkit.inference.speculation.source import SELDOM, Source
from llmkit.inference.speculation.speculator import Speculator
from llmkit.inference.steer import Rules, Steer
from llmkit.models.paged import BlockStore

here = pytest.mark.skipif(bool(lacks("linear") or lacks("paged")), reason=lacks("linear") or lacks("paged"))
FAULTS = {
    "a slip": TypeError("no such thing"),
    "no memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "no memory of the host": MemoryError(),
}


class Failing:
    """A forward that fails once it has run `left` times; whatever else is asked is the inner one's."""

    def __init__(self, inner: Any, cause: Exception, left: int) -> None:
        self.inner, self.cause, self.left = inner, cause, left

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _fails(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.cause

    def hidden(self, *given: Any) -> torch.Tensor:
        self._fails()
        made: torch.Tensor = self.inner.hidden(*given)
        return made

    def features(self, states: Any) -> torch.Tensor:
        self._fails()
        made: torch.Tensor = self.inner.features(states)
        return made


@here
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("who", ["draft", "head"])
def test_a_drafter_that_fails_is_given_up_and_answers_go_on(
    who: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    trial, requests = Trial(lively()), asked(0, 6, "drawn")
    plain = trial.plain(requests)
    one: Any = small(trial, trial.near, 200) if who == "draft" else head(trial, Schedule(1))
    one.forward = Failing(one.forward, FAULTS[fault], 3)
    engine = trial.engine(Schedule(0, sequences=9), (Lookup(trial.words), one))
    with caplog.at_level(logging.WARNING, "llmkit"):
        made = trial.through(engine, requests)
    assert made.told() == plain.told() and made.drafted, "what looks up goes on drafting"
    (fallen,) = engine.stats().fallen
    assert type(FAULTS[fault]).__name__ in fallen and "test_speculation_faults.py:" in fallen
    assert [fallen in record.getMessage() for record in caplog.records] == [True]
    assert [source.name for source in engine.speculator.sources] == ["Lookup"]


@here
def test_where_all_that_drafts_has_failed_nothing_is_drafted() -> None:
    trial, requests = Trial(lively()), asked(0, 4, "greedy")
    who = small(trial, trial.near, 200)
    who.forward = Failing(who.forward, FAULTS["no memory"], 4)
    engine = trial.engine(Schedule(0), who)
    assert trial.through(engine, requests).told() == trial.plain(requests).told()
    assert not engine.speculator.sources and not any(one.drafts for one in engine.scheduler.running)


@here
def test_what_a_failed_forward_was_to_read_is_not_taken_for_read() -> None:
    trial = Trial(lively())
    who = Small(Failing(trial.near, MemoryError(), 0), BlockStore(200, trial.size), trial.words, 512)
    one = Text(Request("a", (4, 5, 6), Sampling(max_tokens=9)), 0, [4, 5, 6, 7])
    with pytest.raises(MemoryError):
        who.draft([Ask(one, 3, Steer(Rules(one.request, ()), [7]))])
    assert who.room.of(one).fed == []


@here
def test_a_law_is_worked_out_once_for_each_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    trial, laws = Trial(lively()), list[int]()
    law = Steer.law
    monkeypatch.setattr(Steer, "law", lambda self, row: (laws.append(id(self)), law(self, row))[1])
    one = Text(
        Request("a", (4, 5, 6), Sampling(max_tokens=9, temperature=0.7, allowed_ids=tuple(range(9, 60)))),
        0,
        [4, 5, 6, 7],
    )
    steer = Steer(Rules(one.request, ()), [7])
    (made,) = DRAFTERS["draft"](trial, trial.plain([]), Schedule(0)).draft([Ask(one, 5, steer)])
    assert len(made.tokens) == 5 == len(laws)


class Timed:
    """Drafts what is always right, or never, in so many seconds."""

    classes, free = 1, True

    def __init__(self, seconds: float, right: bool) -> None:
        self.seconds, self.right, self.asked, self.seen = seconds, right, 0, 0

    def draft(self, asks: Sequence[Ask]) -> list[Draft]:
        self.asked += 1
        time.sleep(self.seconds)
        return [Draft([1 if self.right else 2], [0]) for _ in asks]

    def see(self, chunks: Any, rows: Any) -> None:
        self.seen += 1


def asked_of(who: Timed, steps: int, step: float) -> int:
    """How often it is asked in the last of twice as many steps, each of which takes so long."""
    one = Text(Request("", (1,), Sampling(max_tokens=9999)), 0, [1, 1], cached=1)
    speculator, steer, before = Speculator([Source(who, 4)]), Steer(Rules(one.request, ()), []), 0
    for at in range(2 * steps):
        before = who.asked if at == steps else before
        speculator.propose([one], lambda _: steer, 64, 0)
        speculator.see([], [])
        speculator.costs.see(1 + len(one.drafts), step)
        one.drafts = []
        one.tokens.append(1)
        one.cached += 1
    assert who.seen == who.asked
    return who.asked - before


def test_what_is_free_and_keeps_nothing_takes_next_to_no_time() -> None:
    assert asked_of(Timed(0.001, right=False), 100, step=0.01) <= 100 / 9
    assert asked_of(Timed(0.001, right=False), 100, step=0.0015) <= 1 + 100 / SELDOM


def test_what_is_free_and_right_or_takes_no_time_is_asked_always() -> None:
    assert asked_of(Timed(0.001, right=True), 50, step=0.01) == 50
    assert asked_of(Timed(0.0, right=False), 50, step=0.05) == 50


class Slow(Lookup):
    """Reads a token in a millisecond: a prompt of 200 in two steps."""

    def _read(self, one: Text) -> Automaton:
        known = self.texts.get(one)
        time.sleep((len(one.tokens) - (0 if known is None else len(known.text))) * 0.001)
        return super()._read(one)


WAYS: dict[str, Callable[[Lookup], Any]] = {
    "alone": lambda own: own,
    "with branches": lambda own: Branched(own, Recycled(500, 2)),
    "beside a corpus": lambda own: Retrieval(Corpus(*indexed([np.array([490, 491], np.int32)], 500)), own),
}


@pytest.mark.parametrize("way", WAYS)
def test_to_read_a_prompt_is_no_cost_of_the_drafts_after_it(way: str) -> None:
    own = Slow(500)
    source, rested = Source(WAYS[way](own), 4), 0
    one = Text(Request("", tuple(range(200)), Sampling(max_tokens=9999)), 0, [*range(200), 400], cached=200)
    speculator, steer = Speculator([source]), Steer(Rules(one.request, ()), [])
    for at in range(40):
        speculator.propose([one], lambda _: steer, 64, 0)
        speculator.costs.see(1 + len(one.drafts), 0.1)
        one.drafts = []
        one.tokens.append(401 + at)  # never what was drafted
        one.cached += 1
        rested += source.rested
    assert not rested and len(own.texts[one].text) == 240 and not speculator.fallen


WRONG = {
    "a token of another vocabulary": Draft([3, 50], [0, 0]),
    "a negative token": Draft([-1], [0]),
    "a class that is none": Draft([3], [1]),
    "fewer classes than tokens": Draft([3, 4], [0]),
    "a parent that comes later": Draft([3, 4], [0, 0], [1, -1]),
    "fewer parents than tokens": Draft([3, 4], [0, 0], [-1]),
    "twins": Draft([3, 3], [0, 0], [-1, -1]),
}


@pytest.mark.parametrize("which", WRONG)
def test_one_that_drafts_what_cannot_be_is_given_up(which: str) -> None:
    class Odd(Timed):
        def draft(self, asks: Sequence[Ask]) -> list[Draft]:
            return [WRONG[which] for _ in asks]

    one = Text(Request("", (1,), Sampling(max_tokens=99)), 0, [1, 1], cached=1)
    sources = [Source(Timed(0, True), 4, words=50), Source(Odd(0, True), 4, "odd", 50)]
    speculator, steer = Speculator(sources, fixed=True), Steer(Rules(one.request, ()), [])
    speculator.propose([one], lambda _: steer, 64, 0, trees=True)
    assert one.drafts == [1] and [source.name for source in speculator.sources] == ["Timed"]
    assert speculator.fallen[0].startswith("odd: ValueError (tree.py:")
