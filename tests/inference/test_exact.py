"""Batch invariance: the logits of a request are the same to the bit whatever its neighbours, the chunks of its prompt,
a prefix that was found, a preemption."""

from __future__ import annotations

import pytest
import torch
from llmkit_kernels.build import lacks

from llmkit.models.families import tiny
from llmkit.models.load import How, load
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from tests.conftest import make_model
from tests.inference.exact import Seen, Trial, ready, some

FAMILIES = ("Llama", "Gemma-2", "Mixtral", "Phi-3")
MORE = (
    "Qwen3",
    "Mistral",
    "Gemma-3",
    "gpt-oss",
    "StarCoder2",
    "GPT-2",
    "Qwen3-MoE",
    "OLMo-2",
    "Cohere",
    "SmolLM3",
    "GLM-4-MoE",
)
here = pytest.mark.skipif(bool(lacks("linear") or lacks("paged")), reason=lacks("linear") or lacks("paged"))


def checked(trial: Trial, schedules: int, count: int = 8) -> None:
    """Random schedules in which all happened that may move a bit."""
    seen: list[Seen] = []
    for seed in range(schedules):
        requests = some(trial.words, seed // 20, count, 20, 12)
        seen.append(trial.check(seed, requests))
    assert min(one.compared for one in seen) > 5
    for what in ("preempted", "hits"):
        assert any(getattr(one, what) for one in seen), what
    assert max(one.together for one in seen) > 3


@here
@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_is_alone_to_the_bit(family: str) -> None:
    trial = Trial(ready(tiny(family)))
    assert trial.decoder.exact
    checked(trial, 6)


@here
def test_sizes_that_are_no_whole_vectors() -> None:
    odd = make_model(hidden_size=36, intermediate_size=50, num_attention_heads=3, num_key_value_heads=1, head_dim=12)
    checked(Trial(ready(odd)), 6)


@pytest.mark.parametrize("family", ["Llama", "Gemma-2"])
def test_without_kernels_it_is_where_that_is_asked_for(family: str, uncompiled: None) -> None:
    model = ready(tiny(family))
    checked(Trial(model, exact=True), 6)
    with pytest.raises(AssertionError, match="in schedule"):
        checked(Trial(model), 6)  # the control: torch's own order depends on how many rows there are


@here
@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_of_more_families(family: str) -> None:
    checked(Trial(ready(tiny(family))), 20)


@here
@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_two_thousand_schedules(part: int) -> None:
    checked(Trial(ready(tiny(FAMILIES[part]))), 500)


@here
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_of_a_real_model() -> None:
    """SmolLM2-135M on two threads, with chunks and prefixes of hundreds of tokens."""
    ref = ModelRef(name="smollm2-135m-instruct-q4")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trial = Trial(load(resolve(ref), ref, How()).model, size=16)
        for seed in range(6):
            trial.check(seed, some(trial.words, seed // 3, 6, 200, 12))
    finally:
        torch.set_num_threads(before)
