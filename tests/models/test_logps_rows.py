"""A head with a few trained rows: its values and gradients are those of dense logits, on odd shapes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmkit.models.attend import install
from llmkit.models.heads import Scored
from llmkit.models.logits import Shape
from llmkit.models.logps import plain_logps
from llmkit.models.logps_rows import Rows, row_logps, trained_rows
from tests.adapters.properties import batches
from tests.conftest import make_model


@pytest.mark.parametrize("shape", [Shape(), Shape(0.5, 0.0), Shape(2.0, 3.0)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [0, 1, 17])
def test_values_and_gradients_are_those_of_dense_logits(shape, biased, count):
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(31, 8, generator=g), torch.randn(31, generator=g) if biased else None
    hidden = torch.randn(count, 8, generator=g, requires_grad=True)
    rows, places = torch.randn(3, 8, generator=g, requires_grad=True), torch.tensor([2, 30, 7])
    labels = torch.randint(0, 31, (count,), generator=g)
    labels[: count // 2] = 30  # a label whose row is trained
    factor = torch.randn(count, generator=g)
    ours = row_logps(hidden, Rows(weight, bias, rows, places), labels, shape)
    theirs = plain_logps(hidden, weight.index_copy(0, places, rows), bias, labels, shape)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    mine, other = (torch.autograd.grad((made * factor).sum(), [hidden, rows]) for made in (ours, theirs))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(row_logps(hidden, Rows(weight, bias, rows, places), labels, shape), ours)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_trained_rows_takes_this_way_with_the_gradients_of_the_other(tied, monkeypatch):
    where = {"embed_tokens": [5, 16]} if tied else {"embed_tokens": [5, 16], "lm_head": [5, 16]}
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=where)
    base = make_model(tie_word_embeddings=tied)
    install(base, "auto")
    model = get_peft_model(base, config)
    scored, (batch, *_) = Scored(model), batches()
    assert trained_rows(scored.causal[0].get_output_embeddings()) is not None
    grads = []
    for _ in range(2):
        model.zero_grad()
        scored(batch).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        monkeypatch.setattr("llmkit.models.heads.trained_rows", lambda head: None)
    assert grads[0].keys() == grads[1].keys() and any("tokens_delta" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert trained_rows(scored.causal[0].get_output_embeddings()) is None
