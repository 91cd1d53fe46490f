"""Losses over policies: closed forms, gradients, and what must change nothing."""

import math
from dataclasses import replace

import pytest
import torch

from llmkit.core.errors import RecipeError
from llmkit.core.types import Batch, Branches, Entropic, Valued
from llmkit.losses.policy_node import Cispo, Dapo, DrGrpo, Grpo, Gspo, Reinforce, Rloo
from llmkit.losses.ppo import clipped_values
from llmkit.losses.ppo_node import AdaptiveKl, FixedKl, PpoLoss
from tests.losses.completions import drawing

NODES = [Grpo(), DrGrpo(length=16), Dapo(), Gspo(clip=0.1, clip_high=0.2), Cispo(most=1.2), Rloo(), Reinforce()]
IDS = [node.kind for node in NODES]


def value(node, made, logps=None, entropy=None, which=None, **each):
    batch, kept = made.batch(which, **each)
    logps = made.logps if logps is None else logps
    entropy = made.entropy if entropy is None else entropy
    return node(Entropic(logps[kept], entropy[kept]), batch)


@pytest.mark.parametrize("node", [node for node in NODES if node.kind != "cispo"], ids=lambda node: node.kind)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_gradients_are_those_of_the_value(node, kl):
    held_fixed = kl == "k2"  # the ratio, where it corrects this one
    node = replace(node, beta=0.3, kl=kl, penalty="loss", entropy=0.1, kl_corrected=not held_fixed)
    made = drawing(spread=0.05)
    inputs = made.logps.clone().requires_grad_(), made.entropy.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda logps, entropy: value(node, made, logps, entropy).total, inputs)


def test_every_token_of_cispo_keeps_its_gradient():
    made = drawing()
    logps = made.logps.clone().requires_grad_()
    got = torch.autograd.grad(value(Cispo(most=1.2), made, logps).total, logps)[0]
    ratio = (made.logps - made.old).exp()
    assert (ratio > 1.2).any()
    torch.testing.assert_close(got, -ratio.clamp_max(1.2) * made.advantages[made.of])


@pytest.mark.parametrize("node", NODES, ids=IDS)
def test_a_policy_before_its_update_has_the_gradient_of_reinforce(node):
    made = drawing()
    logps = made.logps.clone().requires_grad_()
    sums = value(node, made, logps, old=None)
    got = torch.autograd.grad(sums.total / sums.count, logps)[0]
    even = made.advantages[made.of] / len(made.lengths)
    by = {"token": made.advantages[made.of] / len(made.of), "length": even / 16, "even": even / made.lengths[made.of]}
    want = even if node.kind == "rloo" else by[node.share]
    torch.testing.assert_close(got, -want)
    top, bottom = sums.extras["ratio"]
    assert float(top) == float(bottom)  # exactly 1, token by token


@pytest.mark.parametrize("node", NODES, ids=IDS)
def test_accumulation_cannot_change_it(node):
    node, made = replace(node, beta=0.2, entropy=0.05), drawing(completions=12)
    logps = made.logps.clone().requires_grad_()
    whole = value(node, made, logps)
    parts = [value(node, made, logps, which=which) for which in (range(5), range(5, 12))]
    assert float(sum(part.count for part in parts)) == float(whole.count) == node.count(12, len(made.of))
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    ours, theirs = (
        torch.autograd.grad(x, logps, retain_graph=True)[0] for x in (whole.total, sum(p.total for p in parts))
    )
    torch.testing.assert_close(ours, theirs)
    for name, (top, bottom) in whole.extras.items():
        sums = [part.extras[name] for part in parts]
        assert float(sum(a for a, _ in sums)) == pytest.approx(float(top), abs=1e-9)
        assert float(sum(b for _, b in sums)) == float(bottom)


def one(ratio, advantage, node, tokens=1):
    """Completions of equal tokens with this ratio each."""
    zeros = torch.zeros(1, tokens).long()
    branches = Branches(
        torch.zeros(tokens).long(),
        torch.zeros(1).long(),
        {"advantage": torch.tensor([advantage])},
        {"old": torch.zeros(tokens)},
    )
    batch = Batch(zeros, zeros, zeros, torch.ones(1, tokens), None, (0,), branches=branches)
    made = node(torch.full((tokens,), math.log(ratio)), batch)
    return float(made.total / made.count), float(made.extras["clipped"][0])


def test_clips_are_where_they_are_said_to_be():
    assert one(1.1, 1.0, Grpo())[0] == pytest.approx(-1.1)
    assert one(1.5, 1.0, Grpo()) == (pytest.approx(-1.2), 1)
    assert one(1.5, -1.0, Grpo()) == (pytest.approx(1.5), 0)  # what got likelier although it is bad is still held back
    assert one(0.5, -1.0, Grpo()) == (pytest.approx(0.8), 1)
    assert one(0.5, 1.0, Grpo()) == (pytest.approx(-0.5), 0)
    assert one(1.5, 1.0, Dapo())[0] == pytest.approx(-1.28)
    assert one(1.5, 1.0, Gspo())[0] == pytest.approx(-1.0004)
    assert one(1.1, 1.0, Rloo(), tokens=2)[0] == pytest.approx(-1.2)  # 1.1 squared is more than 1.2
    assert one(1.1, 1.0, Gspo(clip=0.2, clip_high=0.2), tokens=2)[0] == pytest.approx(-1.1)
    assert one(2.0, 1.0, Cispo(most=1.5))[0] == pytest.approx(-1.5 * math.log(2))
    assert one(1.5, 1.0, DrGrpo(length=8), tokens=2)[0] == pytest.approx(-1.2 * 2 / 8)


def test_other_laws_tokens_count_by_truncated_weights():
    made = drawing()
    behaviour = made.old + 0.2 * torch.randn(len(made.old), generator=torch.Generator().manual_seed(3)).double()
    plain, by = value(Dapo(), made), value(Dapo(truncate=1.1), made, behaviour=behaviour)
    ratio = (made.logps - made.old).exp()
    each = -torch.minimum(ratio * made.advantages[made.of], ratio.clamp(0.8, 1.28) * made.advantages[made.of])
    torch.testing.assert_close(plain.total, each.sum())
    torch.testing.assert_close(by.total, (each * (made.old - behaviour).exp().clamp_max(1.1)).sum())
    same = value(Dapo(), made, behaviour=made.old)
    assert float(same.total) == pytest.approx(float(plain.total), abs=1e-12)


def test_corrected_estimates_have_the_gradient_of_the_divergence_of_the_policy():
    """Over all words, exactly: each word counts as often as the policy draws it."""
    g = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 7, generator=g, dtype=torch.float64).unbind()
    logits.requires_grad_()
    law, reference = torch.log_softmax(logits, 0), torch.log_softmax(other, 0)
    backward = torch.autograd.grad((law.exp() * (law - reference)).sum(), logits, retain_graph=True)[0]
    forward = torch.autograd.grad((reference.exp() * (reference - law)).sum(), logits, retain_graph=True)[0]

    def gradient(node):
        branches = Branches(
            torch.arange(7),
            torch.zeros(7).long(),
            {},
            {"reference": reference, "advantage": torch.zeros(7).double()},
        )
        zeros = torch.zeros(1, 7).long()
        batch = Batch(zeros, zeros, zeros, law.detach().exp()[None], None, (0,), branches=branches)
        return torch.autograd.grad(node(law, batch).total, logits, retain_graph=True)[0]

    for kl in ("k1", "k2", "k3"):
        torch.testing.assert_close(gradient(Dapo(beta=1.0, kl=kl)), backward)
    torch.testing.assert_close(gradient(Dapo(beta=1.0, kl="k2", kl_corrected=False)), backward)
    torch.testing.assert_close(gradient(Dapo(beta=1.0, kl="k3", kl_corrected=False)), forward)
    with pytest.raises(RecipeError, match="holds nothing back"):
        Dapo(beta=1.0, kl="k1", kl_corrected=False)


@pytest.mark.parametrize("node", [Grpo(), Gspo(), Rloo(penalty="loss"), Cispo()], ids=lambda node: node.kind)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_price_of_completions_of_two_tokens_is_that_of_the_divergence_after_each_prefix(node, kl):
    """Over all completions, each as often as the policy before the update draws it; the policy has moved since."""
    g = torch.Generator().manual_seed(1)
    first, second, old1, old2, ref1, ref2 = (
        torch.log_softmax(torch.randn(n, generator=g, dtype=torch.float64), 0).requires_grad_()
        for n in (3, 3, 3, 3, 3, 3)
    )
    leaves = torch.stack([first, second]).detach().requires_grad_()
    policy, old = torch.log_softmax(leaves, 1), torch.stack([old1, old2]).detach()
    reference = torch.stack([ref1, ref2]).detach()
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    often = (old[0, pairs[:, 0]] + old[1, pairs[:, 1]]).exp()
    drawn_of = {
        name: law.T[pairs, torch.arange(2)].reshape(-1) for name, law in (("old", old), ("reference", reference))
    }
    of = torch.arange(9).repeat_interleave(2)
    zeros = torch.zeros(1, 18).long()
    total = torch.zeros(())
    for k in range(9):  # one by one, so that each counts as often as it is drawn
        mine = of == k
        branches = Branches(
            torch.zeros(2).long(),
            torch.zeros(1).long(),
            {"advantage": torch.zeros(1).double()},
            {name: values[mine] for name, values in drawn_of.items()},
        )
        batch = Batch(zeros[:, :2], zeros[:, :2], zeros[:, :2], torch.ones(1, 2), None, (0,), branches=branches)
        logps = policy.T[pairs[k], torch.arange(2)]
        share = 2.0 if node.share == "even" else 1.0  # of which a token has half
        total = total + often[k] * share * replace(node, beta=1.0, kl=kl)(logps, batch).total
    got = torch.autograd.grad(total, leaves, retain_graph=True)[0]
    meant = (policy.exp() * (policy - reference)).sum()
    if kl == "k2":  # whose correction is held fixed: its gradient is (log p - log reference) d log p under the policy
        meant = (policy.detach().exp() * (policy - reference).square() / 2).sum()
    torch.testing.assert_close(got, torch.autograd.grad(meant, leaves)[0])


def test_what_is_lacking_is_said():
    made = drawing()
    with pytest.raises(ValueError, match="reference"):
        value(Grpo(beta=0.1), made, reference=None)
    batch, _ = made.batch()
    with pytest.raises(ValueError, match="entrop"):
        Grpo(entropy=0.1)(made.logps, batch)
    with pytest.raises(ValueError, match="length"):
        value(DrGrpo(), made)
    assert DrGrpo().within(5).length == 5
    assert DrGrpo(length=3).within(5).length == 3


def test_values_are_held_near_what_they_were():
    v, old, target = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 0.5])
    losses, hit = clipped_values(v, old, target, 0.2)
    torch.testing.assert_close(losses, torch.tensor([1.0, 1.8**2, 0.5**2]) / 2)
    assert hit.tolist() == [False, True, False]
    torch.testing.assert_close(clipped_values(v, old, target, 0.0)[0], (v - target) ** 2 / 2)


def test_ppo_is_its_parts():
    made = drawing()
    values = torch.randn(len(made.old), generator=torch.Generator().manual_seed(1)).double()
    batch, _ = made.batch(value=values + 0.1, **{"return": values + 1})
    sums = PpoLoss(value=0.5, entropy=0.2)(Valued(Entropic(made.logps, made.entropy), values), batch)
    policy = value(Dapo(clip=0.2, clip_high=0.2), made).total
    want = policy + (0.5 * clipped_values(values, values + 0.1, values + 1, 0.2)[0] - 0.2 * made.entropy).sum()
    torch.testing.assert_close(sums.total, want)
    assert float(sums.count) == len(made.old)


def test_the_price_of_a_divergence_follows_its_target():
    assert FixedKl(beta=0.3).after(0.3, 100.0, 8) == 0.3
    node = AdaptiveKl(beta=0.2, target=6.0, horizon=100)
    assert node.after(0.2, 6.0, 50) == 0.2
    assert node.after(0.2, 60.0, 50) == pytest.approx(0.2 * 1.1)
    assert node.after(0.2, 0.0, 50) == pytest.approx(0.2 * 0.9)
    assert node.after(0.2, 6.6, 50) == pytest.approx(0.2 * 1.05)
