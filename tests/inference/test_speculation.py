"""Drafts change nothing of what is made: tokens, log-probabilities and ends are those of no drafts, to the bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from llmkit_kernels.build import lacks

from llmkit.inference.blocks import Blocks
from llmkit.inference.check import Facts
from llmkit.inference.engine import Engine
from llmkit.inference.grammar import Regex
from llmkit.inference.request import Event, Request
from llmkit.inference.runner import Runner
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Limits
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.drafter import Ask, Draft, Drafter
from llmkit.inference.speculation.model import Small
from llmkit.inference.speculation.ngram import Lookup
from llmkit.inference.speculation.speculator import Speculator
from llmkit.inference.text import Texts
from llmkit.models.decoder import Decoder
from llmkit.models.families import tiny
from llmkit.models.paged import BlockStore
from tests.conftest import make_model, make_tokenizer
from tests.inference.exact import ready

here = pytest.mark.skipif(bool(lacks("linear") or lacks("paged")), reason=lacks("linear") or lacks("paged"))
ENDS = (3, 9)
Made = dict[tuple[str, int], list[Event]]


class Knowing:
    """Drafts what was made without drafts, and is wrong now and then."""

    classes, free = 2, True

    def __init__(self, made: Made, seed: int, right: float) -> None:
        self.drawn, self.right = random.Random(seed), right
        self.texts = {key: [token.id for event in events for token in event.tokens] for key, events in made.items()}

    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        return [self.one(ask.sequence, ask.count) for ask in asks]

    def one(self, one: Sequence, count: int) -> Draft:
        text = self.texts[one.request.id, one.index][one.made : one.made + self.drawn.randint(0, count)]
        text += [self.drawn.randrange(40) for _ in range(self.drawn.randint(0, 2))]  # past the end of an answer too
        text = [t if self.drawn.random() < self.right else self.drawn.randrange(40) for t in text][:count]
        return Draft(text, [1] * len(text))


class Trial:
    def __init__(self, model: Any) -> None:
        self.decoder = Decoder(ready(model))
        near = copy.deepcopy(model)  # a drafter that is often right
        with torch.no_grad():
            for weight in near.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1 * float(weight.std()))
        self.near = Decoder(ready(near))
        self.words = len(self.decoder.causal.get_output_embeddings().weight)
        self.texts = Texts(make_tokenizer())

    def run(self, requests: Seq[Request], drawn: random.Random | None = None, drafter: Drafter | None = None) -> Made:
        """What is made of requests in a random schedule, or one after the other without drafts."""
        blocks, limits = 400, Limits(1024, 4)
        if drawn is not None:
            blocks, limits = drawn.choice([30, 60, 400]), Limits(drawn.choice([7, 16, 64]), drawn.choice([4, 9]))
        store = BlockStore(blocks, 4)
        speculator = None if drafter is None or drawn is None else Speculator(drafter, drawn.randint(1, 8), fixed=True)
        facts, runner = Facts(self.words, blocks * 4, ENDS), Runner(self.decoder, store)
        engine = Engine(runner, Blocks(blocks, 4), limits, facts, self.texts, store.copy, None, speculator)
        made: Made = {}
        waiting = list(requests)
        while waiting or not engine.idle:
            if waiting and (engine.idle if drawn is None else drawn.random() < 0.6):
                engine.add(waiting.pop(0))
            for event in engine.step():
                made.setdefault((event.request, event.index), []).append(event)
        assert engine.scheduler.blocks.room == blocks
        self.stats = engine.stats()
        return made


def flat(made: Made) -> dict:
    """What is told, whatever the steps."""
    return {
        key: (
            [(t.id, t.logprob, t.sampling_logprob, dict(t.top)) for event in events for t in event.tokens],
            [(event.finish, event.stopped, event.why) for event in events if event.finish is not None],
            [event.prompt for event in events if event.prompt],
        )
        for key, events in made.items()
    }


def move(prompt, made, logits):
    return logits + (len(made) % 3) * logits.roll(1)


WAYS = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "several": {"temperature": 0.8, "n": 3},
    "told": {"temperature": 0.7, "logprobs": 3, "prompt_logprobs": 1},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "bounded": {"min_tokens": 6, "stop_ids": (5, 6), "logit_bias": {7: 3.0, 9: 4.0}, "bad_words": ("ab",)},
    "stopped": {"temperature": 1.5, "stop": ("e", "th")},
    "allowed": {"temperature": 1.0, "allowed_ids": tuple(range(2, 12))},
    "on": {"ignore_eos": True, "temperature": 0.5},
    "beams": {"beams": 3},
    "grammar": {"grammar": Regex(pattern="[a-h]{2,9}"), "temperature": 1.0},
}


def lively() -> Any:
    """A model whose text depends on every token of it, and on where it stands."""
    return make_model(initializer_range=0.5)


def asked(seed: int, count: int, way: str) -> list[Request]:
    drawn, made = random.Random(seed), []
    for at in range(count):
        start = [drawn.randrange(40) for _ in range(drawn.randint(1, 5))]
        prompt = tuple(start * drawn.randint(1, 3))
        how = Sampling(**{"max_tokens": drawn.randint(6, 16), "seed": at, **WAYS[way]})
        made.append(Request(f"{way}{seed}-{at}", prompt, how, processors=(move,) if way == "drawn" and at % 2 else ()))
    return made


def compared(model: Any, way: str, schedules: int, count: int = 8) -> int:
    """How many answers were made with drafts, all of them as they are without."""
    trial, answers, right, looked = Trial(model), 0, 0, 0
    for seed in range(schedules):
        requests = asked(seed // 4, count, way)
        plain = trial.run(requests)
        small = Small(trial.near, BlockStore(random.Random(seed).choice([12, 200]), 4), trial.words, 512)
        drafters: list[Drafter] = [Knowing(plain, seed, 0.8), Lookup(trial.words), small]
        made = trial.run(requests, random.Random(seed), drafters[seed % 3])
        assert flat(made) == flat(plain), seed
        answers, right, looked = answers + len(made), right + trial.stats.accepted, looked + trial.stats.drafted
    assert (0 < right < looked) == (way != "beams")
    return answers


@here
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_is_that_of_no_drafts_to_the_bit(way: str) -> None:
    assert compared(lively(), way, 6) >= 48


@here
@pytest.mark.parametrize("family", ["Gemma-2", "Mixtral", "Qwen3"])
def test_of_other_families(family: str) -> None:
    assert compared(tiny(family), "drawn", 3) >= 24
