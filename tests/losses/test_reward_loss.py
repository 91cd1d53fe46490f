"""Losses of reward models: closed forms, gradients, what scores may be shifted by, and TRL's own."""

import math
from types import SimpleNamespace

import pytest
import torch

from llmkit.core.errors import RecipeError
from llmkit.core.types import Batch, Branches
from llmkit.losses.reward_node import BradleyTerry


def batch_of(pairs, margin=None, order=None):
    """`pairs` prompts with two answers each, the chosen one second in every other; scores come in `order`."""
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0] * pairs)[: 2 * pairs]
    per = {"label": labels} | ({} if margin is None else {"margin": margin.repeat_interleave(2)})
    of = torch.arange(2 * pairs) if order is None else order
    none = torch.zeros(1, 2 * pairs).long()
    branches = Branches(of, torch.arange(pairs).repeat_interleave(2), per)
    return Batch(none, none, none, torch.ones(1, 2 * pairs), None, (0,), branches=branches)


def scores_of(pairs, seed=0, kind=torch.float64):
    """Scores of `pairs` pairs as a head gives them, and those of the chosen and of the rejected answers."""
    drawn = (2 * torch.randn(2 * pairs, 1, generator=torch.Generator().manual_seed(seed), dtype=kind)).requires_grad_()
    chosen = batch_of(pairs).branches.per["label"] > 0.5
    return drawn, drawn[chosen, 0], drawn[~chosen, 0]


def mean(made):
    return made.total / made.count


def test_the_loss_is_that_of_bradley_and_terry():
    scores, up, down = scores_of(7)
    made = BradleyTerry()(scores, batch_of(7))
    torch.testing.assert_close(made.total, -(up.exp() / (up.exp() + down.exp())).log().sum())
    assert float(made.count) == 7
    even = BradleyTerry()(torch.zeros(4, 1), batch_of(2))
    assert float(mean(even)) == pytest.approx(math.log(2)) and float(even.extras["accuracy"][0]) == 1.0
    figures = {name: float(top) / float(bottom) for name, (top, bottom) in made.extras.items()}
    assert figures["accuracy"] == pytest.approx(float((up > down).double().mean()))
    assert figures["reward_margin"] == pytest.approx(figures["reward_chosen"] - figures["reward_rejected"])


def test_smoothing_margin_and_centre_are_what_their_formulas_say():
    scores, up, down = scores_of(5)
    margin = torch.linspace(-1, 2, 5, dtype=torch.float64)
    made = BradleyTerry(label_smoothing=0.1, center=0.01)(scores, batch_of(5, margin))
    softplus = torch.nn.functional.softplus
    want = 0.9 * softplus(margin - (up - down)) + 0.1 * softplus(margin - (down - up)) + 0.01 * (up + down) ** 2
    torch.testing.assert_close(mean(made), want.mean())


def test_a_smoothed_loss_is_least_where_the_chance_is_that_of_the_labels():
    gap = torch.linspace(-4, 6, 2001, dtype=torch.float64)
    made = [float(BradleyTerry(label_smoothing=0.2)(torch.stack([g, g * 0]), batch_of(1)).total) for g in gap[::10]]
    best = gap[::10][min(range(len(made)), key=made.__getitem__)]
    assert float(torch.sigmoid(best)) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("loss", [{}, {"label_smoothing": 0.2}, {"center": 0.3, "label_smoothing": 0.1}], ids=str)
def test_gradients_are_those_of_the_values(loss):
    scores, *_ = scores_of(4)
    margin = torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: BradleyTerry(**loss)(s, batch_of(4, margin)).total, scores)


def test_a_shift_of_all_scores_matters_to_the_centre_alone():
    scores = scores_of(6)[0].detach()
    for smoothing in (0.0, 0.1):
        plain = BradleyTerry(label_smoothing=smoothing)
        torch.testing.assert_close(plain(scores + 7.5, batch_of(6)).total, plain(scores, batch_of(6)).total)
    centred = BradleyTerry(center=0.01)
    assert float(centred(scores + 7.5, batch_of(6)).total) > float(centred(scores, batch_of(6)).total) + 1


def test_the_order_of_positions_does_not_matter():
    scores, *_ = scores_of(6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        BradleyTerry(center=0.1)(scores[order], batch_of(6, order=order)).total,
        BradleyTerry(center=0.1)(scores, batch_of(6)).total,
    )


def test_sums_of_parts_are_the_sum_of_all():
    scores, *_ = scores_of(6)
    whole = BradleyTerry(label_smoothing=0.1, center=0.01)(scores, batch_of(6))
    parts = [BradleyTerry(label_smoothing=0.1, center=0.01)(part, batch_of(2)) for part in scores.split(4)]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    assert sum(float(part.count) for part in parts) == float(whole.count)


def test_a_batch_of_weight_0_has_a_gradient_of_0():
    scores = torch.zeros(0, 1, requires_grad=True)
    made = BradleyTerry()(scores, batch_of(2))
    made.total.backward()
    assert float(made.total.detach()) == float(made.count) == 0 and scores.grad is not None


def test_answers_without_another_are_no_pair():
    batch = batch_of(2)
    batch.branches.per["label"][:] = 1.0
    with pytest.raises(ValueError, match="one chosen answer and one rejected"):
        BradleyTerry()(torch.zeros(4, 1), batch)


@pytest.mark.parametrize("given", [{"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"center": -1.0}], ids=str)
def test_numbers_out_of_bounds_are_refused(given):
    with pytest.raises(RecipeError, match=next(iter(given))):
        BradleyTerry(**given)


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("center", [None, 0.01])
def test_the_loss_equals_trls(center, margins):
    """Its own `compute_loss`, on scores in its order: all chosen answers, then all rejected ones."""
    from collections import defaultdict

    trainer = pytest.importorskip("trl.trainer.reward_trainer").RewardTrainer
    scores, up, down = scores_of(9, kind=torch.float32)
    margin = torch.rand(9) if margins else None
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {"logits": torch.cat([up, down])[:, None]} | ({"margin": margin} if margins else {})
    theirs = trainer.compute_loss(
        stand_in, lambda logits, use_cache, margin=None: SimpleNamespace(logits=logits), dict(inputs)
    )
    ours = BradleyTerry(center=center or 0.0)(scores, batch_of(9, margin))
    torch.testing.assert_close(mean(ours), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*[torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (mean(ours), theirs)])
    said = stand_in._metrics["eval"]
    assert float(ours.extras["accuracy"][0]) / 9 == pytest.approx(said["accuracy"][0])
    assert float(ours.extras["reward_margin"][0]) / 9 == pytest.approx(said["margin"][0], rel=1e-5)


def test_a_label_that_is_likely_counts_both_ways_by_its_chance():
    scores, up, down = scores_of(3)
    batch, doubt = batch_of(3), torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)
    batch.branches.per["doubt"] = doubt.repeat_interleave(2)
    softplus = torch.nn.functional.softplus
    want = (1 - doubt) * softplus(down - up) + doubt * softplus(up - down)
    torch.testing.assert_close(BradleyTerry()(scores, batch).total, want.sum())
