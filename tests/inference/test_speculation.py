"""Drafts change nothing of what is made: tokens, log-probabilities and ends are those of no drafts, to the bit.

Each way of choosing with each that drafts, in random schedules; the same runs in `llmkit prove speculation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from llmkit_kernels.build import lacks

from llmkit.cli.speculation.drafters import DRAFTERS
from llmkit.cli.speculation.equality import Compared
from llmkit.cli.speculation.equality import compared as compare
from llmkit.cli.speculation.tiny import family as made_of
from llmkit.cli.speculation.tiny import lively
from llmkit.cli.speculation.trial import Made, Schedule, Trial
from llmkit.cli.speculation.ways import WAYS, asked
from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling
from llmkit.inference.speculation.drafter import Ask, Draft

here = pytest.mark.skipif(bool(lacks("linear") or lacks("paged")), reason=lacks("linear") or lacks("paged"))


def compared(model: Any, way: str, schedules: int, count: int = 8, drafters: Sequence[str] = ()) -> Compared:
    """Answers that were made with drafts, all of them as they are without."""
    trial, found = Trial(model), Compared()
    makers = {name: DRAFTERS[name] for name in drafters or DRAFTERS}
    for first in range(0, schedules, len(makers)):  # other requests after a schedule of each
        seeds = range(first, min(schedules, first + len(makers)))
        for one in compare(trial, asked(first // len(makers), count, way), makers, seeds).values():
            found.join(one)
        assert not found.different, found.first
        assert not found.leaked
    assert (0 < found.accepted < found.drafted) == (way != "beams")
    return found


@here
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_is_that_of_no_drafts_to_the_bit(way: str) -> None:
    assert compared(lively(), way, len(DRAFTERS), 2).answers >= 2 * len(DRAFTERS)


@here
@pytest.mark.parametrize(
    "family", ["Gemma-2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Mixtral", "Qwen3", "Gemma-3"))]
)
def test_of_other_families(family: str) -> None:
    assert compared(made_of(family), "drawn", len(DRAFTERS), 3).answers >= 3 * len(DRAFTERS)


@here
def test_schedules_are_of_all_kinds() -> None:
    """Those above, together: sequences were preempted, prefixes were found."""
    found = compared(lively(), "greedy", len(DRAFTERS), 6)
    assert found.preempted and found.hits


class Right:
    """Drafts what was made without drafts."""

    classes, free = 1, True

    def __init__(self, made: Made) -> None:
        self.made = made

    def draft(self, asks: Sequence[Ask]) -> list[Draft]:
        texts = [self.made.tokens((ask.sequence.request.id, ask.sequence.index)) for ask in asks]
        some = [text[ask.sequence.made :][: ask.count] for text, ask in zip(texts, asks, strict=True)]
        return [Draft(text, [0] * len(text)) for text in some]


@here
def test_a_draft_that_ended_its_answer_is_counted() -> None:
    """All that are among the tokens of an event are, and the steps that it took."""
    trial = Trial(lively())
    text = trial.plain([Request("a", (4, 5, 6), Sampling(max_tokens=9, ignore_eos=True))]).tokens(("a", 0))
    ended = [Request("a", (4, 5, 6), Sampling(max_tokens=9, ignore_eos=True, stop_ids=(text[4],)))]
    made = trial.run(ended, Schedule(0, drafts=4), Right(trial.plain(ended)))
    first, *events = made.events["a", 0]
    count = text.index(text[4]) + 1
    assert (first.accepted, len(first.tokens), events[-1].finish) == (0, 1, "stop")
    assert sum(event.accepted for event in events) == made.accepted == count - 1 == sum(len(e.tokens) for e in events)
    assert sum(event.steps for event in (first, *events)) == 1 + len(events) == 2
