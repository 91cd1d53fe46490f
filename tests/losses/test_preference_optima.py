"""Where losses of preference lead: the optimum of a bandit, and labels of which some are wrong."""

import pytest
import torch

from llmkit.losses.referred_node import Dpo, Ipo
from llmkit.losses.sides import Sides

REWARDS = torch.tensor([1.0, 0.2, -0.5, 0.6, -1.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)


def trained(loss, beta, flipped=0.0):
    """The policy over 5 answers that makes the loss of all pairs least, in expectation: both answers are drawn from the
    reference, and labels by Bradley and Terry's law of the rewards, of which a share is turned."""
    logits = REFERENCE.log().clone().requires_grad_()
    first, second = torch.cartesian_prod(*[torch.arange(5)] * 2).T
    better = (REWARDS[first] - REWARDS[second]).sigmoid()
    better = better * (1 - flipped) + (1 - better) * flipped
    shares = REFERENCE[first] * REFERENCE[second] * better
    ones = torch.ones_like(shares)
    other = Sides(REFERENCE.log()[first], REFERENCE.log()[second], ones, ones)
    optim = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def mean():
        optim.zero_grad()
        logps = logits.log_softmax(0)
        total = (loss(Sides(logps[first], logps[second], ones, ones), other).losses * shares).sum()
        total.backward()
        return total

    optim.step(mean)
    return logits.detach().log_softmax(0)


def kl(logps, tilt):
    """Of a policy to pi_ref exp(tilt) / Z."""
    goal = (REFERENCE.log() + tilt).log_softmax(0)
    return (logps.exp() * (logps - goal)).sum().item()


@pytest.mark.parametrize("beta", [0.2, 1.0])
@pytest.mark.parametrize(
    ("flipped", "more"), [(0.0, {}), (0.2, {"variant": "robust", "label_smoothing": 0.2})], ids=["clean", "flipped"]
)
def test_dpo_comes_to_the_optimum_of_rewards_held_to_the_reference(beta, flipped, more):
    """pi_ref exp(r / beta) / Z; robust DPO comes to it from labels of which a fifth is turned, plain DPO does not."""
    assert abs(kl(trained(Dpo(beta=beta, **more), beta, flipped), REWARDS / beta)) < 1e-6
    if flipped:
        assert kl(trained(Dpo(beta=beta), beta, flipped), REWARDS / beta) > 0.02


def test_ipo_comes_to_the_optimum_of_how_often_an_answer_is_better():
    """pi_ref exp(P(y better than one of the reference) / tau) / Z."""
    wins = ((REWARDS[:, None] - REWARDS[None]).sigmoid() * REFERENCE).sum(1)
    for tau in (0.2, 1.0):
        assert abs(kl(trained(Ipo(tau=tau, average=False), tau), wins / tau)) < 1e-6


@pytest.mark.parametrize(("form", "slope"), [("forward_kl", lambda u: -1 / u), ("js", lambda u: (u / (1 + u)).log())])
def test_other_divergences_come_to_their_own_optimum(form, slope):
    """There beta f'(pi / pi_ref) - r is one number for all answers."""
    ratio = (trained(Dpo(beta=1.0, f=form), 1.0) - REFERENCE.log()).exp()
    assert (slope(ratio) - REWARDS).std() < 1e-4


def drawn(seed, rows, size):
    """Features of better and worse answers, a fifth of them turned; and of a test without any wrong."""
    generator = torch.Generator().manual_seed(seed)
    truth = 3 * torch.randn(size, generator=generator) / size**0.5

    def draw(count):
        one, two = (torch.randn(count, size, generator=generator) for _ in range(2))
        better = (torch.rand(count, generator=generator) < ((one - two) @ truth).sigmoid())[:, None]
        return torch.where(better, one, two), torch.where(better, two, one)

    chosen, rejected = draw(rows)
    flipped = (torch.rand(rows, generator=generator) < 0.2)[:, None]
    test = draw(4000)
    right = ((test[0] - test[1]) @ truth > 0)[:, None]
    clean = torch.where(right, test[0], test[1]), torch.where(right, test[1], test[0])
    return (torch.where(flipped, rejected, chosen), torch.where(flipped, chosen, rejected)), clean


def judged(loss, seed, rows, size, net, steps, rate):
    """Loss and accuracy on clean pairs of a policy that was trained on those with wrong labels until it knows them."""
    noisy, clean = drawn(seed, rows, size)
    torch.manual_seed(seed)
    scorer = net()
    optim = torch.optim.Adam(scorer.parameters(), rate)

    def sides(pairs):
        ones = torch.ones(len(pairs[0]))
        made = [scorer(side)[:, 0] for side in pairs]
        return Sides(*made, ones, ones), Sides(0 * ones, 0 * ones, ones, ones)

    for _ in range(steps):
        optim.zero_grad()
        loss(*sides(noisy)).losses.mean().backward()
        optim.step()
    with torch.no_grad():
        made = Dpo(beta=1.0)(*sides(clean))
    return made.losses.mean().item(), made.figures["accuracy"].mean().item()


@pytest.mark.slow
def test_with_a_fifth_of_the_labels_wrong_smoothing_beats_plain_dpo():
    """A linear policy that can learn its training pairs by heart: margins without bound cost on clean ones."""
    plain, smooth = Dpo(beta=1.0), Dpo(beta=1.0, label_smoothing=0.2)
    sizes = 150, 50, lambda: torch.nn.Linear(50, 1), 500, 0.1
    pairs = [(judged(smooth, seed, *sizes), judged(plain, seed, *sizes)) for seed in range(5)]
    assert all(ours[0] < theirs[0] for ours, theirs in pairs)
    assert sum(ours[1] for ours, _ in pairs) > sum(theirs[1] for _, theirs in pairs)


@pytest.mark.slow
def test_with_a_fifth_of_the_labels_wrong_robust_dpo_is_right_more_often():
    """A network that can learn its training pairs by heart; robust DPO is right more often for every seed."""

    def net():
        return torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))

    plain, robust = Dpo(beta=1.0), Dpo(beta=1.0, variant="robust", label_smoothing=0.2)
    for seed in range(5):
        sizes = 1000, 20, net, 400, 0.02
        assert judged(robust, seed, *sizes)[1] > judged(plain, seed, *sizes)[1] + 0.05
