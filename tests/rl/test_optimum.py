"""On tables every algorithm comes to reference x exp(reward / beta) / Z, its closed optimum."""

import pytest
import torch

from llmkit.core.types import Valued
from llmkit.losses.policy_node import Cispo, Dapo, DrGrpo, Grpo, Gspo, Reinforce, Rloo
from llmkit.losses.ppo_node import PpoLoss
from llmkit.rl.advantages import ADVANTAGES, by_token, gae, priced, to_go, whitened
from tests.rl.tabular import bandit, batch_of, markov

BETA, GROUPS, SIZE = 0.5, 64, 16
TOYS = {"bandit": bandit, "markov": markov}


def trained(toy, step, steps=150, rate=0.1, reuse=1, beside=()):
    """The law that `step(logits, draw)` leads to: it gives a loss over episodes drawn before."""
    logits = toy.reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits, *beside], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: max(0.02, 1 - at / (steps * reuse)))
    g = torch.Generator().manual_seed(5)
    for _ in range(steps):
        state, action, of, worth = toy.draw(torch.softmax(logits.detach(), 1), GROUPS * SIZE, g)
        old = torch.log_softmax(logits.detach(), 1)[state, action]
        reference = torch.log_softmax(toy.reference, 1)[state, action]
        for _ in range(reuse):
            logps = torch.log_softmax(logits, 1)[state, action]
            optimizer.zero_grad()
            step(logps, old, reference, state, of, worth).backward()
            optimizer.step()
            schedule.step()
    return torch.softmax(logits.detach(), 1)


def over(node):
    """A step of a member of the union, as the stage takes it."""

    def step(logps, old, reference, state, of, worth):
        group = torch.arange(GROUPS).repeat_interleave(SIZE)
        each, per = {"old": old, "reference": reference}, {}
        cost = BETA * (old - reference)
        if node.kind == "reinforce":
            each["advantage"] = whitened(to_go(worth, cost, of))
        else:
            worth = priced(worth, cost, of) if node.penalty == "reward" else worth
            per["advantage"] = ADVANTAGES[node.advantage](worth, group)
        sums = node(logps, batch_of(len(of), of, group, per, each))
        return sums.total / sums.count

    return step


FAST = [Grpo(beta=BETA, penalty="reward"), Rloo(beta=BETA)]
OTHERS = [
    DrGrpo(beta=BETA, penalty="reward", length=2),
    Dapo(beta=BETA, penalty="reward"),
    Gspo(beta=BETA, penalty="reward", clip=0.1, clip_high=0.1),
    Cispo(beta=BETA, penalty="reward"),
    Reinforce(beta=BETA),
]
NODES = [*FAST, *(pytest.param(node, marks=pytest.mark.slow) for node in OTHERS)]


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.kind)
@pytest.mark.parametrize("toy", TOYS)
def test_members_of_the_union_reach_it(node, toy):
    made = TOYS[toy]()
    optimum = made.optimum(BETA)
    assert made.divergence(torch.softmax(made.reference, 1), optimum) > 0.3  # it is not where they begin
    law = trained(made, over(node), reuse=2 if node.kind in ("grpo", "rloo") else 1)
    assert made.divergence(law, optimum) < 0.02


def test_the_optimum_is_the_best_of_all_laws():
    """The closed form, episode by episode."""
    made, law = markov(), markov().optimum(BETA)
    ref = torch.softmax(made.reference, 1)
    weights = torch.zeros(3, 3, dtype=torch.float64)  # of an episode by its first move and its second
    weights[:2] = ref[0, :2, None] * ref[1:] * torch.exp(made.worth[1:] / BETA)
    weights[2, 0] = ref[0, 2] * torch.exp(made.worth[0, 2] / BETA)
    shares = weights / weights.sum()
    torch.testing.assert_close(law[0], shares.sum(1))
    torch.testing.assert_close(law[1:], shares[:2] / shares[:2].sum(1, keepdim=True))


@pytest.mark.slow
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_a_price_in_the_loss_leads_there_where_one_token_is_all(kl):
    made = bandit()
    law = trained(made, over(DrGrpo(beta=BETA, kl=kl, length=1)))
    assert made.divergence(law, made.optimum(BETA)) < 0.02


@pytest.mark.slow
def test_uncorrected_k3_leads_elsewhere():
    made = bandit()
    law = trained(made, over(DrGrpo(beta=BETA, kl="k3", kl_corrected=False, length=1)))
    assert made.divergence(law, made.optimum(BETA)) > 0.02


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("decay", [0.95, pytest.param(1.0, marks=pytest.mark.slow)])
def test_ppo_reaches_it_with_a_critic_of_its_own(toy, decay):
    made = TOYS[toy]()
    values = torch.zeros(len(made.reference), dtype=torch.float64, requires_grad=True)
    loss = PpoLoss(value=0.5)

    def step(logps, old, reference, state, of, worth):
        rewards, now = by_token(worth, BETA * (old - reference), of), values.detach()[state]
        advantages, returns = gae(rewards, now, of, 1.0, decay)
        each = {"old": old, "value": now, "return": returns, "advantage": whitened(advantages)}
        batch = batch_of(len(of), of, torch.zeros(GROUPS * SIZE).long(), {}, each)
        sums = loss(Valued(logps, values[state]), batch)
        return sums.total / sums.count

    law = trained(made, step, steps=250, beside=[values])
    assert made.divergence(law, made.optimum(BETA)) < 0.02
