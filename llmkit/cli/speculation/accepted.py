"""How many drafts an engine keeps, beside how often the laws of both agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmkit.cli.acceptance.verdict import Check, at_least, at_most
from llmkit.cli.speculation.drafters import Make
from llmkit.cli.speculation.joint import PROMPT, drawn
from llmkit.cli.speculation.laws import after
from llmkit.cli.speculation.trial import Made, Schedule, Trial
from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling
from llmkit.inference.sequence import Sequence as Text
from llmkit.inference.speculation.certificate import likely, overlap
from llmkit.inference.speculation.drafter import Ask, Drafter
from llmkit.inference.speculation.model import Small
from llmkit.inference.steer import Rules, Steer

LENGTH, AT = 3, 1
"""Tokens of an answer, of which one place is drafted for: the first follows from the prompt, and the last is never."""
LEVEL = 0.999
"""Of the interval that is told."""


@dataclass(frozen=True)
class Kept:
    """Of one drafter."""

    drafted: int
    accepted: int
    formed: float
    """The share that is to be kept, in closed form."""
    most: float
    """sum min(p, q): what is kept by no rule more often."""

    def checks(self, name: str, risk: float) -> Iterator[Check]:
        """`risk`: how likely one may fail that is right."""
        from scipy.stats import binomtest

        test = binomtest(self.accepted, self.drafted, min(1.0, max(0.0, self.formed)))
        low, high = test.proportion_ci(LEVEL)
        said = f"kept {test.statistic:.4f} [{low:.4f}, {high:.4f}], closed form {self.formed:.4f}"
        yield at_least(f"{name}: kept, chance", float(test.pvalue), risk, f"{said}; {self.drafted} drafts")
        yield at_most(
            f"{name}: kept / sum min(p, q)", low / max(self.most, 1e-12), 1.0, f"sum min(p, q) {self.most:.4f}"
        )


def kept(trial: Trial, make: Make, sampling: Sampling, draws: int, seed: int) -> Kept:
    """What an engine keeps of one draft for each answer."""
    made = drawn(trial, make, sampling, draws, seed, LENGTH)
    first = after(trial.decoder, [PROMPT], sampling)[0]
    who = make(trial, Made(), Schedule(seed))
    drafter = who[0] if isinstance(who, tuple) else who
    texts = [(*PROMPT, word) for word in range(trial.words)]
    own, drafts = (
        after(trial.decoder, texts, sampling),
        asked(trial, drafter, texts, sampling),
    )
    pairs = list(zip(first, own, drafts, strict=True))
    tried = float(sum(share * q.sum() for share, _, q in pairs))  # where nothing is drafted nothing is kept
    formed, most = (float(sum(share * of(p, q) for share, p, q in pairs)) / tried for of in (overlap, likely))
    return Kept(made.drafted, made.accepted, formed, most)


def asked(
    trial: Trial, drafter: Drafter, texts: Sequence[Sequence[int]], sampling: Sampling
) -> list[NDArray[np.float64]]:
    """The law (V,) of what is drafted after each text: that of a model, or one token for sure, or
    nothing."""
    if isinstance(drafter, Small):
        return list(after(drafter.forward, texts, sampling))
    made = []
    for text in texts:
        request = Request("", PROMPT, sampling)
        steer = Steer(Rules(request, ()), list(text[len(PROMPT) :]))
        draft = drafter.draft([Ask(Text(request, 0, list(text)), 1, steer)])[0]
        made.append(np.eye(trial.words)[draft.tokens[0]] if draft.tokens else np.zeros(trial.words))
    return made
