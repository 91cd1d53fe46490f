"""Each that drafts, over a model in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

import torch

from llmkit.build.drafting import Drafting
from llmkit.cli.speculation.trial import Made, Trial
from llmkit.cli.speculation.ways import KNOWN
from llmkit.inference.cache import Cache
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.drafter import Ask, Draft, Drafter
from llmkit.inference.speculation.head import Head
from llmkit.inference.speculation.model import Small
from llmkit.inference.speculation.most import MOST
from llmkit.inference.speculation.ngram import Lookup
from llmkit.models.decoder import Decoder
from llmkit.models.draft_head import DraftHead, shape_for
from llmkit.models.draft_run import HeadRun
from llmkit.models.paged import BlockStore
from llmkit.models.taps import Taps

LONGEST = 512
TIGHT, ROOMY = 12, 200
"""Blocks of a drafter's cache: in the smaller one sequences push each other out."""
Make = Callable[[Trial, Made, int], Drafter]
"""(the model's trial, what is made without drafts, a seed) -> who drafts."""


class Knowing:
    """Drafts what was made without drafts, and is wrong now and then."""

    classes, free = 2, True

    def __init__(self, made: Made, seed: int, right: float = 0.8) -> None:
        self.made, self.drawn, self.right = made, random.Random(seed), right

    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        """One for each."""
        return [self._one(ask.sequence, ask.count) for ask in asks]

    def _one(self, one: Sequence, count: int) -> Draft:
        text = self.made.tokens((one.request.id, one.index))[one.made : one.made + self.drawn.randint(0, count)]
        text += [self._any() for _ in range(self.drawn.randint(0, 2))]  # past the end of an answer too
        text = [token if self.drawn.random() < self.right else self._any() for token in text][:count]
        return Draft(text, [1] * len(text))

    def _any(self) -> int:
        return self.drawn.randrange(KNOWN)


class Branching:
    """Drafts a random tree, one path of which is what was made without drafts, as far as it goes."""

    classes, free = 2, True

    def __init__(self, made: Made, seed: int) -> None:
        self.made, self.drawn = made, random.Random(seed)

    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        """One for each."""
        return [self._one(ask.sequence, ask.count) for ask in asks]

    def _one(self, one: Sequence, count: int) -> Draft:
        text = self.made.tokens((one.request.id, one.index))[one.made : one.made + count]
        made, paths, follow = Draft(), {-1: list[int]()}, {-1: set[int]()}
        for _ in range(self.drawn.randint(0, MOST)):
            last = self.drawn.choice(sorted(paths)[-self.drawn.choice([1, 4, MOST]) :])
            path = paths[last]
            right = path == text[: len(path)] and len(path) < len(text) and self.drawn.random() < 0.6
            token = text[len(path)] if right else self.drawn.randrange(KNOWN)
            if len(path) < count and token not in follow[last]:
                at = len(made.tokens)
                follow[last].add(token)
                paths[at], follow[at] = [*path, token], set()
                made.tokens.append(token)
                made.parents.append(last)
                made.sureness.append(self.drawn.randint(0, 1))  # the likeliest path is often not the right one
        return made


def small(trial: Trial, forward: Decoder, seed: int) -> Small:
    """A model with a cache of its own, of some size."""
    blocks = random.Random(seed).choice([TIGHT, ROOMY])
    return Small(forward, BlockStore(blocks, trial.size), trial.words, LONGEST)


def shortened(trial: Trial) -> Drafter:
    """The first layer of the model."""
    cache = Cache(size=1 << 22, block=trial.size)
    return Drafting(trial.decoder, trial.tokenizer, cache, ROOMY * trial.size, lambda _: None).shortened(1)


def head(trial: Trial, seed: int) -> Head:
    """A head that nobody trained, over the model's hidden states: with trees of some width."""
    drawn = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = shape_for(trial.model, trial.words)
        run = HeadRun(DraftHead(shape, trial.decoder.causal.get_input_embeddings()), trial.decoder.device)
    store = BlockStore(drawn.choice([TIGHT, ROOMY]), trial.size)
    states = Taps(trial.decoder.causal, shape.taps).take
    return Head(run, store, states, trial.words, drawn.choice([1, 2, 4]), floor=0.0)


DRAFTERS: Mapping[str, Make] = {
    "known": lambda trial, made, seed: Knowing(made, seed),
    "branching": lambda trial, made, seed: Branching(made, seed),
    "ngram": lambda trial, made, seed: Lookup(trial.words),
    "draft": lambda trial, made, seed: small(trial, trial.near, seed),
    "early_exit": lambda trial, made, seed: shortened(trial),
    "head": lambda trial, made, seed: head(trial, seed),
}
"""By the kind of the `speculation` union, but for `known`, which is told what comes and is wrong of a fifth, and
`branching`, which drafts it in trees."""
