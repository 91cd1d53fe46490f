"""Defects that speculation has had elsewhere are planted, one after the other: the comparison finds each."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from llmkit_kernels.build import lacks

from llmkit.cli.speculation.drafters import LONGEST
from llmkit.cli.speculation.tiny import lively
from llmkit.cli.speculation.trial import Made, Schedule, Trial
from llmkit.cli.speculation.ways import KNOWN, asked
from llmkit.inference import engine as engine_
from llmkit.inference import sampler
from llmkit.inference.live import Live
from llmkit.inference.place import Place
from llmkit.inference.request import Request, Token
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Chunk, Scheduler
from llmkit.inference.sequence import Sequence as Text
from llmkit.inference.speculation.drafter import Ask, Draft
from llmkit.inference.speculation.model import Open, Small
from llmkit.inference.steer import Rules, Steer
from llmkit.models.paged import BlockStore
from tests.inference.test_fuzz import run
from tests.inference.test_speculation import compared

here = pytest.mark.skipif(bool(lacks("linear") or lacks("paged")), reason=lacks("linear") or lacks("paged"))
Patch = Any
CHAINS = ("known", "ngram", "draft", "early_exit")
"""Drafters of chains: of those of trees are tests/inference/test_speculation_trees.py."""


def taken_unseen(patch: Patch) -> None:
    """A draft is taken for what was chosen wherever it is possible at all."""
    take = Place.take

    def lenient(self: Place, token: Any) -> bool:
        at = len(self.made)
        if at < len(self.drafts) and token.id != self.drafts[at]:
            logits = self.logits
            if float(logits[self.drafts[at]]) > float(logits.max()) - 1:  # "typical acceptance"
                token = type(token)(self.drafts[at], token.logprob, token.sampling_logprob, token.top)
                self.sequence.tokens[-1] = token.id
        return take(self, token)

    patch.setattr(Place, "take", lenient)


def wrong_row(by: int) -> Callable[[Patch], None]:
    """What follows a draft is read off the row before or after it."""

    def plant(patch: Patch) -> None:
        def logits(self: Place) -> Any:
            last = len(self.rows) - 1
            at = last - len(self.drafts) + len(self.made)
            return self.rows[min(max(at + (by if self.made else 0), 0), last)]

        patch.setattr(Place, "logits", property(logits))

    return plant


def by_time(patch: Patch) -> None:
    """A draw has the next number of a stream that drafts use up too."""
    stream = np.random.default_rng(0)
    patch.setattr(sampler, "uniform", lambda seed, index, place: float(stream.random()))


def stale_counts(patch: Patch) -> None:
    """Penalties, bounds and grammar do not go along with the drafts."""
    steer, kept = engine_.Engine._steer, {}

    def stale(self: engine_.Engine, one: Any) -> Steer:
        own = steer(self, one)
        if one.cached == len(one.tokens):  # where a step begins
            kept[one] = own.fork(own.index)
        return kept[one] if one.drafts and one in kept else own

    patch.setattr(engine_.Engine, "_steer", stale)


def past_the_end(patch: Patch) -> None:
    """What ends a text is not looked at where more was drafted."""
    ending = Live.ending

    def wrong(self: Live, one: Any, token: Any) -> Any:
        finish, stopped = ending(self, one, token)
        return (None, None) if finish == "stop" and len(one.drafts) > 1 else (finish, stopped)

    patch.setattr(Live, "ending", wrong)


def published(patch: Patch) -> None:
    """Drafts that nobody has looked at are found by others."""
    commit = Scheduler.commit

    def wrong(self: Scheduler, step: Any) -> None:
        commit(self, step)
        for chunk in step.chunks:
            one = chunk.sequence
            full = (one.cached + len(one.drafts)) // self.blocks.size
            if one.drafts and full > one.published:
                text, kept = one.tokens, one.tokens + one.drafts
                one.tokens = kept
                names = one.name(full, self.blocks.size)
                one.tokens = text
                for index in range(one.published, min(full, len(one.blocks))):
                    self.blocks.publish(one.blocks[index], names[index])
                one.published = min(full, len(one.blocks))

    patch.setattr(Scheduler, "commit", wrong)


def shifted(patch: Patch) -> None:
    """Drafts are computed a place too far on."""
    from llmkit.inference import runner

    class Off(runner.Runner):
        def _there(self, numbers: list[list[int]]) -> Any:
            if len(numbers) == 2 and len(numbers[0]) > 1 and len(set(numbers[1])) == len(numbers[1]):
                numbers = [numbers[0], [numbers[1][0], *(at + 1 for at in numbers[1][1:])]]
            return super()._there(numbers)

    from llmkit.cli.speculation import trial as home

    patch.setattr(home, "Runner", Off)


def one_more(patch: Patch) -> None:
    """One more draft is taken than was right."""
    take = Place.take

    def wrong(self: Place, token: Any) -> bool:
        right = take(self, token)
        return right or len(self.made) < len(self.drafts)

    patch.setattr(Place, "take", wrong)


def lost_prefix(patch: Patch) -> None:
    """Drafts of a step that was cut short are taken for computed."""
    patch.setattr(Chunk, "drafts", property(lambda self: len(self.sequence.drafts) if self.last else 0))


def no_length(patch: Patch) -> None:
    """The bound on a text's length is looked at once a step."""
    ending = Live.ending

    def wrong(self: Live, one: Any, token: Any) -> Any:
        finish, stopped = ending(self, one, token)
        return (None, None) if finish == "length" and one.drafts else (finish, stopped)

    patch.setattr(Live, "ending", wrong)


def stale_keys(patch: Patch) -> None:
    """What a draft model has in its cache of drafts that were wrong is taken for what came in their place."""
    held = Small._held

    def wrong(self: Small, ask: Ask) -> Any:
        fed, one = self.room.of(ask.sequence).fed, ask.sequence
        if ask.count:
            fed[:] = one.tokens[one.before :][: min(len(fed), len(one.tokens) - one.before - 1)]
        return held(self, ask)

    patch.setattr(Small, "_held", wrong)


def holes(patch: Patch) -> None:
    """Of tokens that a draft model did not draft itself none is fed to it."""
    opened = Small._opened

    def wrong(self: Small, ask: Ask) -> Any:
        found = opened(self, ask)
        if found is not None and found.held.fed and self.room.reserve(found.held, len(ask.sequence.tokens)):
            found.held.fed += found.feed[:-1]
            found.feed = found.feed[-1:]
        return found

    patch.setattr(Small, "_opened", wrong)


def steered_twice(patch: Patch) -> None:
    """A draft model's drafts count for the penalties of the text itself."""
    patch.setattr(Steer, "fork", lambda self, index: self)


def counts_of_another(patch: Patch) -> None:
    """A draft model drafts without the penalties of the request."""
    opened = Small._opened

    def wrong(self: Small, ask: Ask) -> Any:
        plain = Request("", ask.sequence.request.prompt, Sampling(max_tokens=99))
        found = opened(self, replace(ask, steer=Steer(Rules(plain, ()), list(ask.steer.made))))
        return None if found is None else replace(found, ask=ask)

    patch.setattr(Small, "_opened", wrong)


class Erring(Small):
    """Drafts of the model itself, which is asked now and then alone, and goes on now and then after a token that it
    would not have said: up to there all is right, whatever came before."""

    right = drafted = 0

    def told(self, plain: Made, seed: int) -> Erring:
        self.plain, self.drawn = plain, Random(seed)
        return self

    def read(self, asks: Seq[Ask]) -> None:
        self.some = [ask if self.drawn.random() < 0.6 else replace(ask, count=0) for ask in asks]
        super().read(self.some)

    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        self.erred: dict[Text, int] = {}
        made = super().draft(self.some)
        for ask, draft in zip(asks, made, strict=True):
            one = ask.sequence
            text = self.plain.tokens((one.request.id, one.index))[one.made :]
            drafts = draft.tokens[: self.erred.get(one)]
            self.drafted += len(drafts)
            self.right += sum(a == b for a, b in zip(drafts, text, strict=False))
        return made

    def _take(self, one: Open, token: Token, row: Any) -> None:
        if self.drawn.random() < 0.3:
            self.erred.setdefault(one.ask.sequence, len(one.made.tokens))
            token = replace(token, id=(token.id + 1) % KNOWN)
        super()._take(one, token, row)


def by_kept(way: str) -> Callable[[], object]:
    """Drafts of the model itself: sum min(p, q) is 1, and each is right."""

    def find() -> None:
        trial = Trial(lively())
        for seed in range(4):
            requests = asked(seed, 8, way)
            plain = trial.plain(requests)
            who = Erring(trial.decoder, BlockStore(200, trial.size), trial.words, LONGEST).told(plain, seed)
            made = trial.run(requests, Schedule.drawn(seed), who)
            assert made.told() == plain.told()
            assert who.right == who.drafted >= made.accepted > 0

    return find


def by_text(way: str) -> Callable[[], object]:
    """What is made with drafts beside what is made without."""
    return lambda: compared(lively(), way, 2 * len(CHAINS), 8, CHAINS)


def by_blocks() -> None:
    """What each block holds, in random events."""
    for seed in range(20):
        run(seed, 300)


DEFECTS: dict[str, tuple[Callable[[Patch], None], Callable[[], object]]] = {
    "a likely draft is taken unseen": (taken_unseen, by_text("greedy")),
    "the row before": (wrong_row(-1), by_text("greedy")),
    "the row after": (wrong_row(1), by_text("drawn")),
    "one number for several places": (by_time, by_text("drawn")),
    "penalties stay behind": (stale_counts, by_text("penalties")),
    "the grammar stays behind": (stale_counts, by_text("regex")),
    "past the end": (past_the_end, by_text("bounded")),
    "past a stop text": (past_the_end, by_text("stopped")),
    "past the length": (no_length, by_text("greedy")),
    "positions of drafts": (shifted, by_text("greedy")),
    "a wrong draft goes on": (one_more, by_text("greedy")),
    "drafts that were cut off": (lost_prefix, by_text("greedy")),
    "drafts are found by others": (published, by_blocks),
    "stale keys of drafts": (stale_keys, by_kept("greedy")),
    "holes in a draft's cache": (holes, by_kept("drawn")),
    "drafts count for penalties": (steered_twice, by_text("penalties")),
    "drafts without penalties": (counts_of_another, by_kept("penalties")),
}


@here
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, find = DEFECTS[name]
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        find()


@here
@pytest.mark.parametrize("way", ["greedy", "drawn", "penalties"])
def test_a_model_that_drafts_for_itself_is_always_right(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by_kept(way)()
    wrong_row(0)(monkeypatch)  # the control: the row itself, and nothing is found
    by_text(way)()
