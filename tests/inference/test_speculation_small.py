"""A model that drafts: it reads a prompt before its drafting is timed, and no request's numbers stop a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from llmkit_kernels.build import lacks

from llmkit.cli.speculation.drafters import small
from llmkit.cli.speculation.tiny import lively
from llmkit.cli.speculation.trial import Made, Schedule, Trial
from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling
from llmkit.inference.speculation.drafter import Ask
from llmkit.inference.speculation.model import FEW, READ, Small
from llmkit.models.paged import BlockStore

pytestmark = pytest.mark.skipif(bool(lacks("linear") or lacks("paged")), reason=lacks("linear") or lacks("paged"))
PROMPT = tuple(range(10, 58))


class Watched:
    """A forward, whose numbers are spoilt if it is said; how many tokens each call had."""

    def __init__(self, inner: Any, spoilt: bool = False) -> None:
        self.inner, self.spoilt, self.fed = inner, spoilt, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def hidden(self, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        self.fed.append(len(tokens))
        made: torch.Tensor = self.inner.hidden(tokens, *others)
        return made

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.inner.logits(hidden)
        return made * torch.nan if self.spoilt else made


class Apart(Small):
    """Keeps how many tokens its forward had in reading."""

    forward: Watched
    reads: list[int]

    def read(self, asks: Sequence[Ask]) -> None:
        before = len(self.forward.fed)
        super().read(asks)
        self.reads += self.forward.fed[before:]


def made_by(trial: Trial, who: Small, prompt: Sequence[int], **sampling: Any) -> Made:
    return trial.run([Request("a", tuple(prompt), Sampling(max_tokens=8, **sampling))], Schedule(1), who)


def test_a_prompt_is_read_before_drafts_are_timed_and_each_of_its_tokens_once() -> None:
    trial = Trial(lively())
    who = Apart(Watched(trial.near), BlockStore(200, trial.size), trial.words, 2 * READ)
    longer = tuple(at % 50 for at in range(READ + 9))
    for prompt in (PROMPT, longer):
        who.reads, who.forward.fed = [], []
        made = made_by(trial, who, prompt)
        meanwhile = len(who.reads) - 1  # tokens that came before all was read; the newest is drafted after
        assert sum(who.reads) == len(prompt) + meanwhile and max(who.reads) <= READ
        drafting = list(who.forward.fed)
        for count in who.reads:
            drafting.remove(count)
        assert drafting and max(drafting) <= FEW and made.drafted


@pytest.mark.parametrize("temperature", [1e-46, 5e-324, 1e30])
def test_a_temperature_of_any_size_is_drafted_at(temperature: float) -> None:
    trial = Trial(lively())
    request = [Request("a", PROMPT, Sampling(max_tokens=8, temperature=temperature))]
    made = trial.run(request, Schedule(1), small(trial, trial.near, 200))
    assert made.drafted and made.told() == trial.plain(request).told()


@pytest.mark.parametrize("way", [{}, {"temperature": 0.8, "top_k": 5}])
@pytest.mark.parametrize("own", [False, True])
def test_a_model_whose_numbers_overflow_drafts_nothing(way: dict[str, Any], own: bool) -> None:
    trial = Trial(lively())
    who = small(trial, trial.near, 200)
    who.forward = Watched(trial.near, spoilt=True)
    processors = (lambda _, __, law: law,) if own else ()
    request = [Request("a", PROMPT, Sampling(max_tokens=6, **way), processors=processors)]
    made = trial.run(request, Schedule(1), who)
    assert not made.drafted and who.forward.fed and made.told() == trial.plain(request).told()
