"""Steps whose answers the student writes itself: a function of the seed, the step and the weights at that moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmkit.core.seed import mixed
from llmkit.data.feed import Drawn, Feed
from llmkit.data.prepared import Prepared
from llmkit.evals.run import before_answer
from llmkit.inference.request import Ask, Prompt
from llmkit.inference.sampling import Sampling

Write = Callable[[Sequence[Ask]], list[list[int]]]
"""Asks -> the tokens of their answers, with the one that ended each, by the weights of that moment."""
POLICY = 0x6F6E
"""Keeps the draw of a step apart from its other randomness."""


@dataclass(frozen=True)
class Sampled:
    """A feed, of whose steps a share has answers that are written anew."""

    feed: Feed
    write: Write
    share: float
    sampling: Sampling
    longest: int
    """Tokens of a prompt and its answer."""
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Those of the feed."""
        return self.feed.steps_per_epoch

    def begin(self, state: Mapping[str, Any]) -> None:
        """As the feed does."""
        self.feed.begin(state)

    def state(self, step: int) -> dict[str, Any]:
        """That of the feed: what is written depends on the step and the weights."""
        return self.feed.state(step)

    def counts(self) -> dict[str, int]:
        """Those of the feed."""
        return self.feed.counts()

    def own(self, index: int) -> bool:
        """Whether a step's answers are written by the student."""
        return mixed(self.seed, index, POLICY) < self.share * 2**63

    def step(self, index: int) -> Drawn:
        """What 0-based step `index` sees."""
        drawn = self.feed.step(index)
        return self._written(drawn, index) if self.own(index) else drawn

    def _written(self, drawn: Drawn, index: int) -> Drawn:
        rows = [[part.tolist() for part in drawn.data.example(at)] for at in drawn.rows]
        prompts = [list(before_answer(ids, weights)) for ids, weights in rows]
        asks = [self._ask(prompt, mixed(self.seed, index, at, POLICY)) for at, prompt in enumerate(prompts)]
        texts = zip(prompts, self.write(asks), strict=True)
        # what says nothing at all is learned as its row has it
        made = [(p + a, [0.0] * len(p) + [1.0] * len(a)) if a else row for (p, a), row in zip(texts, rows, strict=True)]
        ids, weights = (np.concatenate([np.asarray(one[side], kind) for one in made]) for side, kind in SIDES)
        starts = np.cumsum([0, *(len(one[0]) for one in made)]).astype(np.int64)
        places = tuple(drawn.data.places[at] for at in drawn.rows)
        return Drawn(drawn.epoch, drawn.ids, Prepared(ids, weights, starts, (), places=places), range(len(made)))

    def _ask(self, prompt: list[int], seed: int) -> Ask:
        most = min(self.sampling.max_tokens, self.longest - len(prompt))
        least = min(self.sampling.min_tokens, most)
        return Ask(Prompt(tuple(prompt)), replace(self.sampling, max_tokens=most, min_tokens=least, seed=seed))


SIDES = ((0, np.int32), (1, np.float32))
