"""Entropies beside log-probabilities, and laws at a temperature: equal to the dense twin's, values and gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmkit.core.types import Batch, Entropic, Needs, Packed, Segment
from llmkit.models.attend import install
from llmkit.models.heads import Scored
from llmkit.models.logits import Shape
from llmkit.models.logps_entropy import entropic_scores, plain_entropic
from tests.conftest import make_model
from tests.models.test_logps import SHAPES, Largest, close, make


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [(7, 16), (64, 200)])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("figure", [False, True])
def test_values_and_gradients_equal_the_dense_twin(shape, block, trained, figure):
    h, w, b, y, _ = make(bias=True, dtype=torch.float32)
    factors = torch.randn(2, len(y), generator=torch.Generator().manual_seed(1))
    head = [t if trained else t.detach() for t in (w, b)]
    got = entropic_scores(h, *head, y, not figure, shape, block)
    wide = [t.detach().double().requires_grad_() for t in (h, w, b)]
    want = plain_entropic(*wide, y, shape)
    assert got.entropy.requires_grad != figure
    for ours, theirs in zip(got, want, strict=True):
        close(ours, theirs)
    if figure:
        factors[1] = 0
    leaves = [h, *head] if trained else [h]
    parts = [f * x for f, x in zip(factors, got, strict=True) if x.requires_grad]
    made = torch.autograd.grad(sum(part.sum() for part in parts), leaves)
    meant = torch.autograd.grad(sum((f * x).sum() for f, x in zip(factors, want, strict=True)), wide[: len(leaves)])
    for ours, theirs in zip(made, meant, strict=True):
        close(ours, theirs, 2e-6)


def test_a_frozen_head_holds_one_block_of_logits_at_a_time():
    h, w, _, y, _ = make(512, 8, 1000, dtype=torch.float32)
    with Largest() as seen:
        sum(x.sum() for x in entropic_scores(h, w.detach(), None, y, True, block=(64, 100))).backward()
    assert seen.size == 1000 * 8


@pytest.mark.parametrize("trained", [False, True])
def test_it_is_the_same_to_the_bit_with_and_without_gradients(trained):
    h, w, _, y, _ = make(40, 16, 49_152, dtype=torch.float32)
    w = w.detach().requires_grad_(trained)
    with torch.no_grad():
        before = entropic_scores(h, w, None, y, False)
    for ours, theirs in zip(before, entropic_scores(h, w, None, y, False), strict=True):
        assert torch.equal(ours, theirs)


def test_an_even_law_has_the_log_of_its_words():
    made = entropic_scores(torch.zeros(3, 4), torch.randn(50, 4), None, torch.tensor([0, 1, 2]), False)
    torch.testing.assert_close(made.entropy, torch.full((3,), 50.0).log())


@pytest.mark.parametrize("shape", [Shape(), Shape(0.5), Shape(1.0, 4.0), Shape(0.7, 3.0)], ids=str)
def test_a_temperature_divides_final_logits(shape):
    raw = 5 * torch.randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close(shape.at(0.6).apply(raw), shape.apply(raw) / 0.6)


@pytest.mark.parametrize("head_adapter", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_scored_model_gives_what_a_loss_needs(head_adapter, temperature):
    model = make_model()
    install(model, "sdpa")
    if head_adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    model.eval()
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 400, (1, 12), generator=g)
    weights = (torch.rand(1, 12, generator=g) > 0.3).float()
    batch = Batch(tokens, torch.arange(12)[None], tokens.roll(-1), weights, Packed((Segment(0, 0, 12),)), (0,))
    scored = Scored(model)
    made = scored(batch, Needs(by_weight=False, entropy="trained", temperature=temperature))
    logits = model(input_ids=tokens, attend=batch.attend, use_cache=False).logits[0].float() / temperature
    logps = torch.log_softmax(logits, 1)[weights[0] != 0]
    assert isinstance(made, Entropic)
    picked = logps.gather(1, batch.labels[weights != 0][:, None])[:, 0]
    torch.testing.assert_close(made.logps, picked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.entropy, -(logps.exp() * logps).sum(1), rtol=1e-5, atol=1e-5)
    alone = scored(batch, Needs(by_weight=False, temperature=temperature))
    torch.testing.assert_close(alone, made.logps, rtol=1e-5, atol=1e-5)
    ours, theirs = (
        torch.autograd.grad(x.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        for x in (made.entropy - made.logps, -(logps.exp() * logps).sum(1) - picked)
    )
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
