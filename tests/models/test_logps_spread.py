"""The head's normaliser and mean beside its log-probabilities: equal to the dense twin's, values and gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llmkit.core.types import Batch, Needs, Packed, Scores, Segment
from llmkit.losses.node import CrossEntropy, Dft
from llmkit.models.attend import install
from llmkit.models.heads import Scored
from llmkit.models.logps import plain_scores
from llmkit.models.logps_spread import spread_scores
from tests.conftest import make_model
from tests.models.test_logps import SHAPES, Largest, close, make

WORDS = 90
"""Of 101 rows of the vocabulary: the last eleven are padding."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [(1, 101), (7, 16), (64, 200)])
@pytest.mark.parametrize("trained", [False, True])
def test_values_and_gradients_equal_the_dense_twin(shape, bias, block, trained):
    h, w, b, y, _ = make(bias=bias, dtype=torch.float32)
    factors = torch.randn(3, len(y), generator=torch.Generator().manual_seed(1))
    head = [t if trained else t.detach() for t in (w, b) if t is not None]
    got = spread_scores(h, head[0], head[1] if bias else None, y, WORDS, shape, block)
    wide = [t.detach().double().requires_grad_() for t in (h, w, b) if t is not None]
    want = plain_scores(wide[0], wide[1], wide[2] if bias else None, y, shape, WORDS)
    for ours, theirs in zip(got, want, strict=True):
        close(ours, theirs)
    leaves = [h, *head] if trained else [h]
    made = torch.autograd.grad(sum((f * x).sum() for f, x in zip(factors, got, strict=True)), leaves)
    meant = torch.autograd.grad(sum((f * x).sum() for f, x in zip(factors, want, strict=True)), wide[: len(leaves)])
    for ours, theirs in zip(made, meant, strict=True):
        close(ours, theirs, 2e-6)


def test_a_frozen_head_holds_one_block_of_logits_at_a_time():
    h, w, _, y, _ = make(512, 8, 1000, dtype=torch.float32)
    with Largest() as seen:
        sum(x.sum() for x in spread_scores(h, w.detach(), None, y, 900, block=(64, 100))).backward()
    assert seen.size == 1000 * 8


def test_the_loss_equals_torchs_and_pads_of_the_vocabulary_get_no_share():
    h, w, _, y, weights = make(dtype=torch.float32)
    ignored = torch.arange(len(y)) % 3 == 0
    batch = Batch(*[torch.zeros(1, len(y)).long()] * 2, y[None], torch.where(ignored, 0, weights)[None], None, (0,))
    scores = spread_scores(h[~ignored], w, None, y[~ignored], len(w))
    made = CrossEntropy(label_smoothing=0.2)(scores, batch)
    logits, targets = h @ w.T, torch.where(ignored, -100, y)
    each = nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)
    want = (each * weights)[~ignored].sum() / weights[~ignored].sum()
    torch.testing.assert_close(made.total / made.count, want)
    ours, theirs = (torch.autograd.grad(x, [h, w], retain_graph=True) for x in (made.total / made.count, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    padded = torch.cat([w, torch.full((7, w.shape[1]), 3.0)])  # rows that no token has
    spread = spread_scores(h, padded, None, y, len(w))
    torch.testing.assert_close(spread.mean, torch.log_softmax(h @ padded.T, 1)[:, : len(w)].mean(1))
    z = CrossEntropy(z_loss=0.1)(scores, batch)
    plain = CrossEntropy()(scores.logps, batch)
    squares = (torch.logsumexp(logits, 1).square() * weights)[~ignored].sum()
    torch.testing.assert_close(z.total, plain.total + 0.1 * squares)
    torch.testing.assert_close(z.extras["nll"][0], plain.total)


def batch_of(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 400, (1, 20), generator=g)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    weights = (torch.rand(1, 20, generator=g) > 0.3).float()
    return Batch(tokens, positions, tokens.roll(-1), weights, Packed((Segment(0, 0, 12), Segment(0, 12, 20))), (0, 1))


def model_of(trained, head_adapter=False, **more):
    model = make_model(**more)
    install(model, "sdpa")
    model.requires_grad_(trained)
    if head_adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    return model.eval()


def dense(model, batch, loss, words):
    """The loss from all logits, by torch alone."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    hidden = Scored(model).hidden(batch)
    logits = causal.get_output_embeddings()(hidden)[0].double()
    keep, y, w = batch.weights[0] != 0, batch.labels[0], batch.weights[0]
    logps = logits.log_softmax(1)
    picked = logps.gather(1, y[:, None])[:, 0]
    if isinstance(loss, Dft):
        each = -picked.detach().exp() * picked
    else:
        share = loss.label_smoothing
        each = -(1 - share) * picked - share * logps[:, :words].mean(1) + loss.z_loss * logits.logsumexp(1).square()
    return (each * w)[keep].sum()


LOSSES = [CrossEntropy(), CrossEntropy(label_smoothing=0.1), CrossEntropy(z_loss=0.01), Dft()]
LOSSES += [CrossEntropy(label_smoothing=0.1, z_loss=0.01)]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("how", ["frozen", "trained", "head adapter"])
def test_each_loss_of_a_whole_model_has_the_dense_gradients(loss, how):
    tied = how != "head adapter"
    model = model_of(how == "trained", not tied, tie_word_embeddings=tied)
    if how == "frozen":
        model.model.layers[0].mlp.requires_grad_(True)
    batch, words = batch_of(model), 400
    leaves = [p for p in model.parameters() if p.requires_grad]
    made = loss(Scored(model, words)(batch, loss.needs), batch)
    want = dense(model, batch, loss, words)
    torch.testing.assert_close(made.total.double(), want, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x, leaves) for x in (made.total, want))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 5e-6 * b.abs().max()


def test_without_smoothing_nothing_changes_by_a_bit():
    model, batch = model_of(True), batch_of(None)
    assert CrossEntropy(label_smoothing=0.0, z_loss=0.0).needs == Needs()
    scored, plain = Scored(model), CrossEntropy()
    grads = []
    for loss in (plain, CrossEntropy(label_smoothing=0.0)):
        out = scored(batch, loss.needs)
        assert not isinstance(out, Scores)
        grads.append(torch.autograd.grad(loss(out, batch).total, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
