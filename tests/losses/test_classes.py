"""Losses over classes: torch's cross-entropy, the focal formula, group-DRO's weights."""

import math

import pytest
import torch
from torch import nn

from llmkit.core.errors import RecipeError
from llmkit.core.types import Batch, LossSum
from llmkit.losses.node import ClassEntropy, Focal, GroupDro, Seen, balanced
from llmkit.parallel.steps import Adaptive


def batch_of(targets, weights=None, ids=None):
    """One target a row of the batch, at the second of three tokens."""
    n = len(targets)
    labels, held = torch.full((n, 3), -1), torch.zeros(n, 3)
    labels[:, 1], held[:, 1] = targets, torch.ones(n) if weights is None else weights
    return Batch(torch.zeros(n, 3).long(), torch.zeros(n, 3).long(), labels, held, None, tuple(ids or range(n)))


def logits_of(n=40, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, classes, generator=g)).requires_grad_(), torch.randint(classes, (n,), generator=g)


def mean(made):
    return made.total / made.count


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_class_weights_is_torchs(smoothing):
    logits, y = logits_of()
    weights = torch.tensor([1.0, 0.2, 3.0, 1.0, 0.5])
    loss = ClassEntropy(label_smoothing=smoothing).over(Seen([1] * 5))
    made = loss(logits, batch_of(y, weights[y]))
    plain = nn.functional.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
    want = (weights[y] * plain).sum() / weights[y].sum()
    if not smoothing:  # torch spreads the smoothed part by the weights of the other classes too
        torch.testing.assert_close(want, nn.functional.cross_entropy(logits, y, weights))
    torch.testing.assert_close(mean(made), want)
    torch.testing.assert_close(*[torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (mean(made), want)])
    top, bottom = made.extras["accuracy"]
    assert float(top) / float(bottom) == pytest.approx(float((logits.argmax(1) == y).float().mean()))


def test_focal_is_cross_entropy_at_0_and_what_the_formula_says_elsewhere():
    logits, y = logits_of()
    plain = ClassEntropy().over(Seen([1] * 5))(logits, batch_of(y))
    assert torch.equal(Focal(gamma=0).over(Seen([1] * 5))(logits, batch_of(y)).total, plain.total)
    sure = torch.tensor([[math.log(0.9), math.log(0.1)]])
    ratio = Focal(gamma=2).over(Seen([1, 1]))(sure, batch_of(torch.tensor([0]))).total / -math.log(0.9)
    assert float(ratio) == pytest.approx(0.01, rel=1e-5)
    p = logits.softmax(1).gather(1, y[:, None])[:, 0]
    alpha = torch.tensor([0.1, 0.2, 0.3, 0.4, 1.0])
    made = Focal(gamma=1.5, alpha=tuple(alpha.tolist())).over(Seen([1] * 5))(logits, batch_of(y))
    torch.testing.assert_close(mean(made), (-alpha[y] * (1 - p) ** 1.5 * p.log()).mean())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_gradients(gamma):
    logits, y = logits_of(6)
    loss = Focal(gamma=gamma, alpha="auto").over(Seen([8, 1, 1, 5, 5]))
    assert torch.autograd.gradcheck(lambda x: loss(x, batch_of(y)).total, (logits.detach().double().requires_grad_(),))
    certain = torch.tensor([[200.0, 0.0]], requires_grad=True)
    total = loss_of(gamma)(certain, batch_of(torch.tensor([0]))).total
    assert torch.autograd.grad(total, certain)[0].isfinite().all()
    half = logits.detach().bfloat16().requires_grad_()
    assert loss(half, batch_of(y)).total.dtype == torch.float32


def loss_of(gamma):
    return Focal(gamma=gamma).over(Seen([1, 1]))


def test_the_share_of_hard_examples_in_the_gradient_rises_with_gamma_as_the_formula_says():
    chance = torch.tensor([0.95, 0.3])
    shares = []
    for gamma in (0.0, 1.0, 2.0, 4.0):
        logits = torch.stack([chance.log(), (1 - chance).log()], 1).requires_grad_()
        total = loss_of(gamma)(logits, batch_of(torch.tensor([0, 0]))).total
        size = torch.autograd.grad(total, logits)[0][:, 0].abs()
        p = chance
        formula = ((1 - p) ** gamma * (1 - p) - gamma * p * (1 - p) ** gamma * p.log()).abs()
        torch.testing.assert_close(size, formula, rtol=1e-4, atol=1e-6)
        shares.append(float(size[1] / size.sum()))
    assert shares == sorted(shares) and shares[-1] > shares[0]


@pytest.mark.parametrize("node", [ClassEntropy(), Focal(alpha="auto"), GroupDro()], ids=lambda n: n.kind)
def test_accumulation_cannot_change_it(node):
    logits, y = logits_of(12)
    loss = node.over(Seen(torch.bincount(y, minlength=5).tolist(), [0, 0, 1] * 4, ("a", "b")))
    if isinstance(loss, Adaptive):
        loss.begin(range(12))
    whole = loss(logits, batch_of(y)).total / 12
    parts = [loss(logits[s], batch_of(y[s], ids=range(12)[s])).total / 12 for s in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(*[torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (sum(parts), whole)])


def test_group_dro_weighs_groups_by_exponentiated_losses_and_keeps_them():
    logits, y = logits_of(12)
    logits = logits.detach()
    groups = [0] * 9 + [1, 1, 2]

    def make():
        return GroupDro(step=0.5).over(Seen([1] * 5, groups, ("a", "b", "c")))

    loss = make()
    loss.begin(range(12))
    made = loss(logits, batch_of(y))
    each = nn.functional.cross_entropy(logits, y, reduction="none").detach()
    means = torch.stack([each[[g == k for g in groups]].mean() for k in range(3)]).double()
    assert float(mean(made)) == pytest.approx(float(means.mean()), rel=1e-5)  # the first weights are equal
    loss.update(LossSum(made.total, made.count, made.extras))
    q = (0.5 * means).softmax(0)
    loss.begin(range(12))
    assert float(mean(loss(logits, batch_of(y)))) == pytest.approx(float((q * means).sum()), rel=1e-5)
    other = make()
    other.load(loss.state())
    other.begin(range(12))
    assert torch.equal(other(logits, batch_of(y)).total, loss(logits, batch_of(y)).total)
    absent = make()
    absent.begin(range(9))
    part = absent(logits[:9], batch_of(y[:9]))
    assert float(mean(part)) == pytest.approx(float(means[0] / 3), rel=1e-5)  # a group that is not there adds nothing


def test_balanced_weights_have_mean_1_and_alpha_has_one_factor_a_class():
    counts = [90, 9, 1]
    assert sum(n * w for n, w in zip(counts, balanced(counts), strict=True)) == pytest.approx(100)
    assert balanced([2, 0]) == (1.0, 0.0)
    with pytest.raises(RecipeError, match="2 factors for 3 classes"):
        Focal(alpha=(1.0, 2.0)).over(Seen(counts))
    with pytest.raises(RecipeError, match="below 0"):
        Focal(alpha=(1.0, -2.0))
