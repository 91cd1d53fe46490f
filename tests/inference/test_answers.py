"""Grammars, processors and stop texts through the engine itself, with several answers and too few blocks."""

from __future__ import annotations

import json
from typing import Any

import torch

from llmkit.inference.blocks import Blocks
from llmkit.inference.check import Facts
from llmkit.inference.engine import Engine
from llmkit.inference.grammar import JsonSchema
from llmkit.inference.request import Event, Request
from llmkit.inference.runner import Runner
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Limits
from llmkit.inference.text import Texts
from llmkit.models.attend import install
from llmkit.models.decoder import Decoder
from llmkit.models.paged import BlockStore
from tests.conftest import make_model, make_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 22, "three"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TEXTS = Texts(make_tokenizer())


def answered(requests: list[Request], blocks: int) -> dict[str, list[Event]]:
    model = make_model().eval()
    install(model, "auto")
    store = BlockStore(blocks, 4)
    facts = Facts(448, blocks * 4, (2,))
    engine = Engine(Runner(Decoder(model), store), Blocks(blocks, 4), Limits(32, 12), facts, TEXTS, store.copy)
    events: dict[str, list[Event]] = {one.id: [] for one in requests}
    for one in requests:
        engine.add(one)
    while not engine.idle:
        for event in engine.step():
            events[event.request].append(event)
    assert engine.scheduler.blocks.room == blocks
    return events


def said(events: list[Event], index: int) -> list[int]:
    return [token.id for event in events if event.index == index for token in event.tokens]


def test_answers_under_a_grammar_are_valid_and_do_not_depend_on_room_or_neighbours() -> None:
    how = Sampling(temperature=2.0, grammar=JsonSchema.of(SCHEMA), n=3, seed=5, max_tokens=120)
    held = [Request(str(at), (5, 6, 7 + at), how) for at in range(2)]
    free = Request("free", (9, 9), Sampling(temperature=1.0, max_tokens=30, ignore_eos=True))
    wide, tight = answered([*held, free], 400), answered(held, 60)
    for one in held:
        for index in range(3):
            tokens = said(wide[one.id], index)
            assert tokens == said(tight[one.id], index)
            value = json.loads(TEXTS.tokenizer.decode(tokens[:-1]))
            assert tokens[-1] == 2 and value["a"] in (1, 22, "three") and value["b"] in (True, False)
    assert len(said(wide["free"], 0)) == 30


def test_a_processor_that_fails_in_the_middle_ends_its_request_alone() -> None:
    def broken(prompt: Any, made: Any, law: torch.Tensor) -> torch.Tensor:
        if len(made) == 4:
            raise ValueError("enough")
        return law

    how = Sampling(max_tokens=9, ignore_eos=True)
    events = answered([Request("bad", (4, 5), how, processors=(broken,)), Request("good", (4, 5), how)], 40)
    last = events["bad"][-1]
    assert last.finish == "error" and "broken failed: ValueError: enough" in last.why
    assert len(said(events["good"], 0)) == 9 and said(events["good"], 0)[:4] == said(events["bad"], 0)


def test_a_stop_text_ends_an_answer_with_the_token_that_completes_it() -> None:
    how = Sampling(max_tokens=20, temperature=1.0, seed=1, ignore_eos=True)
    whole = said(answered([Request("a", (4, 5), how)], 40)["a"], 0)
    text = TEXTS.tokenizer.decode(whole)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    events = answered([Request("a", (4, 5), Sampling(**{**vars(how), "stop": (stop,)}))], 40)["a"]
    tokens = said(events, 0)
    assert events[-1].finish == "stop" and events[-1].stopped == stop and tokens == whole[: len(tokens)]
    assert stop in TEXTS.tokenizer.decode(tokens) and stop not in TEXTS.tokenizer.decode(tokens[:-1])
