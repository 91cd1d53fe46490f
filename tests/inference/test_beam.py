"""Beam search equals transformers' own, with room for all beams and without."""

from __future__ import annotations

import pytest
import torch

from llmkit.inference.request import Request, RequestError
from llmkit.inference.sampling import Sampling
from llmkit.models.attend import install
from llmkit.models.families import tiny
from tests.inference.test_engine import answers, made

HOW = [
    {"beams": 2},
    {"beams": 4, "n": 3, "length_penalty": 2.0},
    {"beams": 3, "n": 3, "length_penalty": -1.0, "early_stopping": True},
    {"beams": 3, "n": 2, "early_stopping": "never", "repetition_penalty": 1.3},
    {"beams": 5, "n": 5, "min_tokens": 4},
]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["Llama", "Gemma-2"])
def test_beams_find_what_transformers_finds(family: str, how: dict[str, object]) -> None:
    torch.manual_seed(1)
    model = tiny(family).eval()
    model.get_output_embeddings().weight.data.mul_(30)  # else all tokens are about as likely
    install(model, "auto")
    words, drawn = len(model.get_output_embeddings().weight), torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, words, (n,), generator=drawn).tolist() for n in (2, 7, 13)]
    sampling = Sampling(max_tokens=9, stop_ids=tuple(range(0, words, 7)), **how)
    requests = [Request(str(at), tuple(prompt), sampling) for at, prompt in enumerate(prompts)]
    for blocks, tokens in ((64, 32), (8, 6)):
        engine = made(model, blocks, tokens)
        said = answers(engine, requests)
        assert engine.scheduler.blocks.room == blocks and engine.scheduler.slots == 0
        for at, prompt in enumerate(prompts):
            own = generated(model, prompt, sampling)
            assert [one[: len(o)] for one, o in zip(said[str(at)], own, strict=True)] == own
    assert engine.stats().preempted  # in the second they had no room


def generated(model: torch.nn.Module, prompt: list[int], how: Sampling) -> list[list[int]]:
    """The answers of transformers; each without what fills it up."""
    out = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=how.max_tokens,
        min_new_tokens=how.min_tokens or None,
        do_sample=False,
        num_beams=how.beams,
        num_return_sequences=how.n,
        length_penalty=how.length_penalty,
        early_stopping=how.early_stopping,
        repetition_penalty=how.repetition_penalty,
        eos_token_id=list(how.stop_ids),
        pad_token_id=0,
    )
    made = [row[len(prompt) :].tolist() for row in out]
    return [row[: next((at + 1 for at, id in enumerate(row) if id in how.stop_ids), len(row))] for row in made]


def test_what_does_not_go_with_beams_is_refused_by_its_field() -> None:
    model = tiny("Llama").eval()
    install(model, "auto")
    engine = made(model)
    bad = {"n": {"beams": 2, "n": 3}, "beams": {"beams": 9}, "temperature": {"beams": 2, "temperature": 1.0}}
    for key, how in {**bad, "stop": {"beams": 2, "stop": ("x",)}}.items():
        with pytest.raises(RequestError) as refused:
            engine.add(Request("a", (1,), Sampling(max_tokens=1, **how)))
        assert refused.value.problems[0].key == key
    engine.add(Request("a", (1,), Sampling(max_tokens=2, beams=3, n=3, allowed_ids=(5,))))
    events = [event for _ in range(3) for event in engine.step()]
    assert [event.finish for event in events] == ["error"] * 3 and engine.idle
