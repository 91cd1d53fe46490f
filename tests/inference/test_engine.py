"""The engine on tiny models: the same tokens as transformers' own `generate`, whatever is computed beside them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from llmkit.inference.blocks import Blocks
from llmkit.inference.check import Facts
from llmkit.inference.engine import Engine
from llmkit.inference.request import Request, RequestError
from llmkit.inference.runner import Runner
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Limits
from llmkit.inference.text import Texts
from llmkit.models.attend import install
from llmkit.models.decoder import Decoder
from llmkit.models.families import tiny
from llmkit.models.paged import BlockStore
from tests.conftest import make_tokenizer

FAMILIES = ("Llama", "Qwen3", "Gemma-2", "Mistral", "Phi-3", "Gemma-3")


def made(model: Any, blocks: int = 64, tokens: int = 32, sequences: int = 8) -> Engine:
    store = BlockStore(blocks, 4)
    facts = Facts(len(model.get_output_embeddings().weight), blocks * 4, ())

    return Engine(
        Runner(Decoder(model), store),
        Blocks(blocks, 4),
        Limits(tokens, sequences),
        facts,
        Texts(make_tokenizer()),
        store.copy,
    )


def answers(engine: Engine, requests: list[Request]) -> dict[str, list[list[int]]]:
    """The tokens of every answer."""
    said = {one.id: [[] for _ in range(one.sampling.n)] for one in requests}
    for one in requests:
        engine.add(one)
    while not engine.idle:
        for event in engine.step():
            said[event.request][event.index] += [token.id for token in event.tokens]
    return said


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    model = tiny(family).eval()
    install(model, "auto")
    words = len(model.get_output_embeddings().weight)
    drawn = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, words, (n,), generator=drawn).tolist() for n in (1, 3, 4, 9, 17, 30)]
    for blocks in (64, 14):  # in the second they do not all have room
        engine = made(model, blocks)
        said = answers(engine, [Request(str(i), tuple(p), Sampling(max_tokens=12)) for i, p in enumerate(prompts)])
        assert engine.scheduler.blocks.room == blocks
        for i, prompt in enumerate(prompts):
            own = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
            assert said[str(i)][0] == own[0, len(prompt) :].tolist()


def test_answers_to_one_prompt_share_its_blocks_and_differ_by_their_seeds() -> None:
    model = tiny("Llama").eval()
    install(model, "auto")
    prompt, how = tuple(range(5, 18)), Sampling(max_tokens=8, temperature=1.0, n=3, seed=7)
    engine = made(model)
    together = answers(engine, [Request("a", prompt, how), Request("b", (1, 2), Sampling(max_tokens=20))])
    again = answers(made(model, 8), [Request("a", prompt, how)])
    assert together["a"] == again["a"]
    assert len({tuple(one) for one in together["a"]}) == 3
    assert engine.scheduler.blocks.room == 64


def test_what_can_never_be_answered_is_refused_by_its_field() -> None:
    model = tiny("Llama").eval()
    install(model, "auto")
    engine = made(model, blocks=4)
    bad = {
        "prompt": [
            Request("a", ()),
            Request("a", (0,) * 16),
            *(Request("a", (id,), Sampling(max_tokens=1)) for id in (-1, 10**6)),
        ],
        "max_tokens": [Request("a", (1,), Sampling(max_tokens=16))],
        "n": [Request("a", (1,), Sampling(max_tokens=1, n=9))],
        "logit_bias": [Request("a", (1,), Sampling(max_tokens=1, logit_bias={-1: 2.0}))],
    }
    for key, requests in bad.items():
        for request in requests:
            with pytest.raises(RequestError) as refused:
                engine.add(request)
            assert refused.value.problems[0].key == key
    assert engine.idle


def test_an_engine_that_is_let_go_gives_its_cache_back_at_once() -> None:
    """Its cache is gigabytes, and few objects: the collector of cycles would not come for it for a long time."""
    model = tiny("Llama").eval()
    install(model, "auto")
    engine = made(model)
    answers(engine, [Request("a", (5, 6, 7), Sampling(temperature=1.0, max_tokens=4, n=2, seed=1))])
    held = weakref.ref(engine.runner.store)
    gc.disable()
    try:
        del engine
        assert held() is None
    finally:
        gc.enable()
