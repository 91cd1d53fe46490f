"""Tokens of the engine against transformers' own `generate`, one prompt at a time; drawn ones against the exact law.

A mismatch counts where the two likeliest tokens are more than 1e-4 apart in fp64: below that fp32 decides nothing.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from llmkit.build.llm import LLM
from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling
from llmkit.models.attend import install
from llmkit.models.families import tiny
from tests.inference.test_engine import FAMILIES, answers, made

GAP = 1e-4


def counted(model: Any, prompts: list[list[int]], said: list[list[int]], most: int) -> tuple[int, int]:
    """(mismatches that count, those that do not)."""
    exact, bad, ties = copy.deepcopy(model).double(), 0, 0
    for prompt, tokens in zip(prompts, said, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
        own = out[0, len(prompt) :].tolist()
        own = own[:-1] if len(own) < most or own[-1:] != tokens[-1:] else own
        at = next((i for i, (a, b) in enumerate(zip(own, tokens, strict=False)) if a != b), None)
        if at is None:
            bad += abs(len(own) - len(tokens)) > 1  # the token that ends a text is told by one and not the other
            continue
        with torch.no_grad():
            best = exact(torch.tensor([[*prompt, *tokens[:at]]])).logits[0, -1].topk(2).values
        apart = float(best[0] - best[1]) > GAP
        bad, ties = bad + apart, ties + (not apart)
    return bad, ties


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_hundred_prompts(family: str) -> None:
    model = tiny(family).eval()
    install(model, "auto")
    model.generation_config.eos_token_id = None
    words, drawn = len(model.get_output_embeddings().weight), torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, words, (1 + i % 60,), generator=drawn).tolist() for i in range(200)]
    told = answers(made(model), [Request(str(i), tuple(p), Sampling(max_tokens=16)) for i, p in enumerate(prompts)])
    bad, ties = counted(model, prompts, [told[str(i)][0] for i in range(200)], 16)
    assert bad == 0 and ties <= 2


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_hundred_prompts_of_a_real_model() -> None:
    llm = LLM("smollm2-135m-instruct-q4")
    model = llm.loaded.model
    names = ["rain", "a bridge", "the number seven", "an old map", "sound", "a loaf of bread", "tides", "a queue"]
    forms = ["What is {}?", "Write one sentence about {}.", "def about_{}():", "{} is", "List three facts on {}:"]
    asked = [form.format(name) + " " * (turn > 0) * turn for turn in range(5) for form in forms for name in names]
    prompts = [llm.tokens(text) for text in asked]
    said = [list(one.token_ids) for one in llm.generate(prompts, Sampling(max_tokens=24))]
    bad, ties = counted(model, prompts, said, 24)
    assert len(prompts) == 200 and bad == 0 and ties <= 4


def test_drawn_tokens_follow_the_joint_law_of_two_places() -> None:
    model = tiny("Llama").eval()
    install(model, "auto")
    prompt, count = (5, 6, 7, 8, 9), 4000
    how = {"temperature": 0.7, "top_k": 3, "max_tokens": 2}
    engine = made(model, sequences=64, tokens=256)
    asks = [Request(str(i), prompt, Sampling(seed=i, **how)) for i in range(count)]
    seen: dict[tuple[int, ...], int] = {}
    for (tokens,) in answers(engine, asks).values():
        seen[tuple(tokens)] = seen.get(tuple(tokens), 0) + 1

    def law(ids: tuple[int, ...]) -> dict[int, float]:
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].double().topk(3)
        return dict(zip(best.indices.tolist(), torch.softmax(best.values / 0.7, 0).tolist(), strict=True))

    joint = {(a, b): p * q for a, p in law(prompt).items() for b, q in law((*prompt, a)).items()}
    assert set(seen) <= set(joint)
    assert chisquare([seen.get(pair, 0) for pair in joint], [count * p for p in joint.values()]).pvalue > 1e-4
