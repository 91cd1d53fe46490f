"""Each that drafts, over a model in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

import torch

from llmkit.build.cache import Caches, measured
from llmkit.build.drafting import Drafting
from llmkit.cli.speculation.trial import Made, Schedule, Trial, Who
from llmkit.cli.speculation.ways import KNOWN
from llmkit.inference.cache import Cache
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.branched import Branched
from llmkit.inference.speculation.drafter import Ask, Draft, Drafter
from llmkit.inference.speculation.head import Head
from llmkit.inference.speculation.model import Small
from llmkit.inference.speculation.most import MOST
from llmkit.inference.speculation.ngram import Lookup
from llmkit.inference.speculation.recycled import Recycled
from llmkit.models.decoder import Decoder
from llmkit.models.draft_head import DraftHead, shape_for
from llmkit.models.draft_run import HeadRun
from llmkit.models.paged import BlockStore
from llmkit.models.taps import Taps

LONGEST = 512
Make = Callable[[Trial, Made, Schedule], Who]
"""(the model's trial, what is made without drafts, how requests come) -> who drafts."""


class Knowing:
    """Drafts what was made without drafts, and is wrong now and then."""

    classes, free = 2, True

    def __init__(self, made: Made, words: int, seed: int, right: float = 0.8) -> None:
        self.made, self.words, self.drawn, self.right = made, min(words, KNOWN), random.Random(seed), right

    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        """One for each."""
        return [self._one(ask.sequence, ask.count) for ask in asks]

    def _one(self, one: Sequence, count: int) -> Draft:
        text = self.made.tokens((one.request.id, one.index))[one.made : one.made + self.drawn.randint(0, count)]
        text += [self._any() for _ in range(self.drawn.randint(0, 2))]  # past the end of an answer too
        text = [token if self.drawn.random() < self.right else self._any() for token in text][:count]
        return Draft(text, [1] * len(text))

    def _any(self) -> int:
        return self.drawn.randrange(self.words)


class Branching:
    """Drafts a random tree, one path of which is what was made without drafts, as far as it goes."""

    classes, free = 2, True

    def __init__(self, made: Made, words: int, seed: int) -> None:
        self.made, self.words, self.drawn = made, min(words, KNOWN), random.Random(seed)

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
            token = text[len(path)] if right else self.drawn.randrange(self.words)
            if len(path) < count and token not in follow[last]:
                at = len(made.tokens)
                follow[last].add(token)
                paths[at], follow[at] = [*path, token], set()
                made.tokens.append(token)
                made.parents.append(last)
                made.sureness.append(self.drawn.randint(0, 1))  # the likeliest path is often not the right one
        return made


def small(trial: Trial, forward: Decoder, blocks: int) -> Small:
    """A model with a cache of its own."""
    return Small(forward, BlockStore(blocks, trial.size), trial.words, LONGEST)


def shortened(trial: Trial, blocks: int) -> Drafter:
    """The first half of the model's layers."""
    cache = Cache(block=trial.size)
    caches = Caches(measured(trial.decoder, cache), cache, most=blocks * trial.size)
    made = Drafting(trial.decoder, trial.tokenizer, caches)
    return made.shortened(max(1, trial.decoder.causal.config.get_text_config().num_hidden_layers // 2))


def recycled(trial: Trial) -> Branched:
    """What is found by looking back, and branches of what the model thought likely."""
    return Branched(Lookup(trial.words), Recycled(trial.words, 4))


def head(trial: Trial, how: Schedule) -> Head:
    """A head that nobody trained, over the model's hidden states: with trees of some width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        shape = shape_for(trial.model, trial.words)
        run = HeadRun(DraftHead(shape, trial.decoder.causal.get_input_embeddings()), trial.decoder.device)
    states = Taps(trial.decoder.causal, shape.taps).take
    width = random.Random(how.seed).choice([1, 2, 4])
    return Head(run, BlockStore(how.held, trial.size), states, trial.words, width, floor=0.0)


DRAFTERS: Mapping[str, Make] = {
    "known": lambda trial, made, how: Knowing(made, trial.words, how.seed),
    "branching": lambda trial, made, how: Branching(made, trial.words, how.seed),
    "ngram": lambda trial, made, how: Lookup(trial.words),
    "recycled": lambda trial, made, how: recycled(trial),
    "several": lambda trial, made, how: (recycled(trial), small(trial, trial.near, how.held)),
    "draft": lambda trial, made, how: small(trial, trial.near, how.held),
    "early_exit": lambda trial, made, how: shortened(trial, how.held),
    "head": lambda trial, made, how: head(trial, how),
}
"""By the kind of the `speculation` union, but for `known`, which is told what comes and is wrong of a fifth,
`branching`, which drafts it in trees, `recycled`, `ngram` with branches, and `several`: that beside a model."""
