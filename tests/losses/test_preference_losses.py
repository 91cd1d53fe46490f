"""Losses of preference: closed forms, gradients, and what they must not depend on."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.core.errors import RecipeError
from llmkit.core.types import Batch, Branches
from llmkit.losses.direct_node import Cpo, Nll, Orpo, SimPo
from llmkit.losses.preference import sides
from llmkit.losses.preference_node import Mixture, Part, Sides
from llmkit.losses.referred_node import Aot, Apo, Bco, Dpo, Ipo, Nca, Sppo

FORWARD = Dpo(beta=0.5, f="forward_kl")
MIXED = Mixture(parts=(Part(loss=Dpo(beta=0.5), weight=0.8), Part(loss=Nll(), weight=0.3)))
REFERRED = [
    Dpo(beta=0.5),
    Dpo(beta=0.5, label_smoothing=0.1),
    Dpo(beta=0.5, variant="hinge"),
    Dpo(beta=0.5, variant="robust", label_smoothing=0.2),
    Dpo(beta=0.5, variant="exo", label_smoothing=0.01),
    Dpo(beta=0.5, variant="discopop"),
    FORWARD,
    Dpo(beta=0.5, f="js"),
    Dpo(beta=0.5, f="alpha", alpha=0.3),
    Dpo(beta=0.5, average=True),
    Ipo(tau=0.5),
    Ipo(tau=0.5, average=False),
    Apo(beta=0.5),
    Apo(beta=0.5, variant="down"),
    Nca(beta=0.5),
    Bco(beta=0.5),
    Sppo(beta=0.5),
    Aot(beta=0.5),
    Aot(beta=0.5, paired=False),
    MIXED,
]
DIRECT = [SimPo(), SimPo(alpha=0.5), Orpo(), Cpo(), Cpo(variant="hinge"), Nll(), Nll(per="token")]
CW, CL, RW, RL = -3.0, -4.0, -3.5, -3.2
"""Log-probabilities of a chosen and a rejected completion by the policy and by the reference: of 4 and 2 tokens."""
W, L = CW - RW, CL - RL
"""Their ratios."""


def s(x):
    return 1 / (1 + math.exp(-x))


def batch_of(lengths):
    """A batch of two completions for each prompt, of these lengths."""
    flat = [length for pair in lengths for length in pair]
    of = torch.repeat_interleave(torch.arange(len(flat)), torch.tensor(flat))
    row = torch.ones(1, sum(flat))
    branches = Branches(of, torch.arange(len(flat)) // 2)
    return Batch(row.long(), row.long(), row.long(), row, None, (), branches=branches)


def pairs(chosen, rejected, tokens=(4, 2)):
    made = [torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in (chosen, rejected)]
    return Sides(*made, *(torch.full_like(made[0], n) for n in tokens))


def name(loss):
    return repr(loss)[:60]


def test_sides_sum_the_tokens_of_each_completion():
    one = sides(-torch.arange(1.0, 11.0), batch_of([(2, 3), (4, 1)]))
    assert one.chosen.tolist() == [-3, -30] and one.rejected.tolist() == [-12, -10]
    assert one.chosen_tokens.tolist() == [2, 4] and one.rejected_tokens.tolist() == [3, 1]


def test_tokens_beyond_the_shorter_completion_count_by_the_tail():
    one = sides(-torch.arange(1.0, 11.0), batch_of([(2, 3), (4, 1)]), tail=0.5)
    assert one.chosen.tolist() == [-3, -6 - 12] and one.rejected.tolist() == [-3 - 4 - 2.5, -10]


def test_a_tail_is_no_part_of_the_likelihood():
    """In a mixture the supervised part is of the whole chosen completion, whatever tokens beyond the other count."""
    scores, batch = -torch.arange(1.0, 11.0), batch_of([(2, 3), (4, 1)])
    for per, wanted in (("completion", [3 / 2, 30 / 4]), ("token", [3 / 3, 30 / 3])):
        mixed = Mixture(parts=(Part(loss=Dpo(tail=0.5)), Part(loss=Nll(per=per), weight=2.0)))
        made = mixed(sides(scores, batch, mixed.tail), sides(0 * scores, batch, mixed.tail))
        assert made.figures["loss_1_nll"].tolist() == wanted
        dpo = Dpo(tail=0.5)(sides(scores, batch, 0.5), sides(0 * scores, batch, 0.5))
        assert torch.equal(made.losses, dpo.losses + 2 * torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("loss", [FORWARD, Dpo(beta=0.5, f="alpha", alpha=0.9)], ids=name)
def test_far_below_the_reference_losses_and_slopes_are_finite(loss):
    """Where exp(-r) is more than a float holds, of one completion or of both."""
    made = pairs([-900.0, -900.0, -1.0, -900.0], [-900.0, -1.0, -900.0, -1000.0])
    made.chosen.requires_grad_()
    losses = loss(made, pairs([-1.0] * 4, [-1.0] * 4)).losses
    losses.sum().backward()
    slopes = made.chosen.grad
    assert losses.isfinite().all() and slopes.isfinite().all()
    assert slopes.float().square().isfinite().all()
    assert losses[1] > losses[0] > losses[2]  # the chosen one far below, both, the rejected one
    assert slopes[1] < 0  # it is still pulled back


def test_sums_do_not_follow_which_rows_completions_lie_in():
    """Nor which pairs are in a micro-batch together."""
    scores, whole = -torch.rand(10), batch_of([(2, 3), (4, 1)])
    first, second = sides(scores[:5], batch_of([(2, 3)])), sides(scores[5:], batch_of([(4, 1)]))
    for all_P, *parts in zip(*(one.columns().values() for one in (sides(scores, whole), first, second)), strict=True):
        assert torch.equal(all_P, torch.cat(parts))
    mixed = torch.randperm(10)
    moved = Branches(whole.branches.of[mixed], whole.branches.group)
    there = sides(scores[mixed], Batch(*[whole.tokens] * 3, whole.weights, None, (), branches=moved))
    assert torch.allclose(there.chosen, sides(scores, whole).chosen)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (Dpo(beta=0.5), -math.log(s(0.5 * (W - L)))),
        (Dpo(beta=0.5, label_smoothing=0.1), -0.9 * math.log(s(0.5 * (W - L))) - 0.1 * math.log(s(-0.5 * (W - L)))),
        (Dpo(beta=0.5, variant="hinge"), 1 - 0.5 * (W - L)),
        (Dpo(beta=0.5, tail=0.2), -math.log(s(0.5 * (W - L)))),
        (FORWARD, -math.log(s(0.5 * (-math.exp(-W) + math.exp(-L))))),
        (Dpo(beta=0.5, average=True), -math.log(s(0.5 * (W / 4 - L / 2)))),
        (Ipo(tau=0.5), (W / 4 - L / 2 - 1) ** 2),
        (Ipo(tau=0.5, average=False), (W - L - 1) ** 2),
        (SimPo(beta=2.0, gamma=0.3), -math.log(s(2 * (CW / 4 - CL / 2) - 0.3))),
        (Cpo(beta=0.5, alpha=0.7), -math.log(s(0.5 * (CW - CL))) - 0.7 * CW / 4),
        (Apo(beta=0.5), 1 - s(0.5 * W) + s(0.5 * L)),
        (Apo(beta=0.5, variant="down"), s(0.5 * W) + 1 - s(0.5 * (W - L))),
        (Sppo(beta=0.5), (W - 1) ** 2 + (L + 1) ** 2),
        (Bco(beta=0.5), -math.log(s(0.5 * W)) - math.log(s(-0.5 * L))),
        (Nll(), -CW / 4),
        (MIXED, -0.8 * math.log(s(0.5 * (W - L))) - 0.3 * CW / 4),
    ],
    ids=name,
)
def test_each_is_its_closed_form(loss, value):
    made = loss(pairs(CW, CL), pairs(RW, RL))
    assert made.losses.tolist() == pytest.approx([value], rel=1e-12)
    assert made.figures["accuracy"].tolist() == [float(made.figures["reward_margin"].item() > 0)]


def test_orpo_is_its_closed_form_and_finite_where_a_text_is_certain():
    odds = [math.exp(p) / (1 - math.exp(p)) for p in (CW / 4, CL / 2)]
    made = Orpo(beta=0.5)(pairs(CW, CL), None)
    assert made.losses.item() == pytest.approx(-CW / 4 - 0.5 * math.log(s(math.log(odds[0] / odds[1]))))
    sure = pairs(0.0, -1.0)
    sure.chosen.requires_grad_()
    losses = Orpo()(sure, None).losses
    losses.sum().backward()
    assert losses.isfinite().all() and sure.chosen.grad.isfinite().all()


def test_the_robust_loss_is_in_expectation_that_of_the_true_labels():
    wrong, there, back = 0.2, (pairs(CW, CL), pairs(RW, RL)), (pairs(CL, CW), pairs(RL, RW))
    robust, plain = Dpo(beta=0.5, variant="robust", label_smoothing=wrong), Dpo(beta=0.5)
    seen = (1 - wrong) * robust(*there).losses + wrong * robust(*back).losses
    assert seen.item() == pytest.approx(plain(*there).losses.item(), rel=1e-12)


def test_divergences_meet_at_the_ends_of_alpha():
    policy, reference = pairs(CW, CL), pairs(RW, RL)
    for alpha, other in ((1e-7, Dpo(beta=0.5)), (1 - 1e-7, FORWARD)):
        made = Dpo(beta=0.5, f="alpha", alpha=alpha)(policy, reference).losses
        assert made.item() == pytest.approx(other(policy, reference).losses.item(), rel=1e-5)


@pytest.mark.parametrize("loss", REFERRED + DIRECT, ids=name)
def test_gradients_are_those_of_differences(loss):
    torch.manual_seed(0)
    inputs = [(-3 * torch.rand(3, dtype=torch.float64) - 1).requires_grad_() for _ in range(2)]
    reference = pairs(-3.3 + torch.rand(3), -3.1 + torch.rand(3))

    def losses(chosen, rejected):
        return loss(Sides(chosen, rejected, *reference[2:]), reference).losses.sum()

    assert torch.autograd.gradcheck(losses, inputs)
    assert all(not figure.requires_grad for figure in loss(Sides(*inputs, *reference[2:]), reference).figures.values())


LOGPS = st.floats(-60, -0.5)


@settings(deadline=None)
@given(*[st.lists(LOGPS, min_size=2, max_size=2)] * 4, st.floats(-20, 20))
def test_what_both_models_share_does_not_matter(cw, cl, rw, rl, shift):
    """A prompt that either model finds likelier moves all its completions alike: only ratios count."""
    for loss in REFERRED:
        if loss is MIXED:
            continue
        here = loss(pairs(cw, cl), pairs(rw, rl))
        both = [[x + shift for x in one] for one in (cw, cl, rw, rl)]
        there = loss(pairs(*both[:2]), pairs(*both[2:]))
        assert torch.allclose(here.losses, there.losses, rtol=1e-6, atol=1e-9)


@settings(deadline=None)
@given(*[LOGPS] * 4, st.floats(-20, 20))
def test_what_shifts_both_completions_does_not_matter_to_losses_of_a_margin(cw, cl, rw, rl, shift):
    """Of the policy alone: the normaliser of the optimum cancels between completions of one prompt."""
    for loss in (REFERRED[0], REFERRED[1], REFERRED[2], Ipo(tau=0.5, average=False)):
        here, there = (loss(pairs(cw + by, cl + by), pairs(rw, rl)).losses.item() for by in (0.0, shift))
        assert here == pytest.approx(there, rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(*[LOGPS] * 4)
def test_swapping_the_completions_turns_the_margin(cw, cl, rw, rl):
    for loss in REFERRED + DIRECT:
        tokens = (3, 3)
        here = loss(pairs(cw, cl, tokens), pairs(rw, rl, tokens)).figures["reward_margin"].item()
        there = loss(pairs(cl, cw, tokens), pairs(rl, rw, tokens)).figures["reward_margin"].item()
        assert here == pytest.approx(-there, rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(-10, -0.1), min_size=9, max_size=9), st.lists(st.floats(-10, -0.1), min_size=3, max_size=3))
def test_log_probabilities_of_prompts_do_not_matter(completions, prompt):
    """Positions without a weight have no score; one that is scored for another reason is of no completion's sum."""
    batch = batch_of([(2, 3), (3, 1)])
    plain = sides(torch.tensor(completions), batch)
    cut = [0, 2, 5, 8, 9]
    by_hand = [sum(completions[a:b]) for a, b in pairwise(cut)]
    assert plain.chosen.tolist() == pytest.approx(by_hand[::2], rel=1e-6)
    weights = torch.cat([torch.zeros(3), torch.ones(9)])[None]
    longer = Batch(weights.long(), weights.long(), weights.long(), weights, None, (), branches=batch.branches)
    everywhere = torch.tensor([*prompt, *completions])
    assert torch.equal(sides(everywhere[weights[0] != 0], longer).chosen, plain.chosen)


def test_more_of_the_margin_is_never_a_larger_loss():
    chosen = torch.linspace(-8, -1, 30)
    for loss in (*REFERRED[:3], FORWARD, Nca(), Bco(), Apo(), SimPo(), Orpo(), Cpo()):
        made = loss(pairs(chosen, torch.full((30,), -4.0)), pairs(torch.full((30,), -4.0), torch.full((30,), -4.0)))
        if not isinstance(loss, Nca):
            assert (made.losses.diff() <= 0).all()
        assert (made.figures["reward_margin"].diff() > 0).all()


def test_a_mixture_says_what_each_part_is_and_needs_what_they_need():
    made = MIXED(pairs(CW, CL), pairs(RW, RL))
    assert made.figures["loss_0_dpo"].item() == pytest.approx(-math.log(s(0.5 * (W - L))))
    assert made.figures["loss_1_nll"].item() == pytest.approx(-CW / 4)
    assert MIXED.needs_reference and not MIXED.whole_step and MIXED.tail == 1
    other = Mixture(parts=(Part(loss=SimPo()), Part(loss=Nll(per="token"))))
    assert not other.needs_reference and other.whole_step
    assert Mixture(parts=(Part(loss=Dpo(tail=0.5)), Part(loss=Nll()))).tail == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dpo(variant="hinge", label_smoothing=0.1),
        lambda: Dpo(variant="exo"),
        lambda: Cpo(variant="hinge", label_smoothing=0.1),
        lambda: Mixture(parts=()),
        lambda: Mixture(parts=(Part(loss=Dpo(tail=0.5)), Part(loss=Dpo()))),
        lambda: Dpo(beta=0.0),
    ],
)
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(RecipeError):
        make()


def test_a_batch_without_pairs_and_a_missing_reference_are_told():
    batch = batch_of([(2, 3)])
    odd = Branches(batch.branches.of, torch.tensor([0, 0, 1]))
    for branches in (None, odd):
        with pytest.raises(ValueError, match="pairs"):
            sides(torch.zeros(5), Batch(*[batch.tokens] * 3, batch.weights, None, (), branches=branches))
    with pytest.raises(ValueError, match="reference"):
        Dpo()(pairs(CW, CL), None)


def test_a_label_that_is_likely_counts_both_ways_by_its_chance():
    """The likelier the other way round, the lower the margin at which the loss is least; certain ones are as ever."""
    doubt = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    policy, reference = pairs([CW] * 4, [CL] * 4), pairs([RW] * 4, [RL] * 4)
    made = Dpo(beta=0.5)(policy._replace(doubt=doubt), reference).losses
    m = 0.5 * (W - L)
    want = [-(1 - e) * math.log(s(m)) - e * math.log(s(-m)) for e in doubt.tolist()]
    torch.testing.assert_close(made, torch.tensor(want, dtype=torch.float64))
    assert torch.equal(made[0], Dpo(beta=0.5)(policy, reference).losses[0])
    both = Dpo(beta=0.5, label_smoothing=0.1)(policy._replace(doubt=doubt), reference).losses[1]
    e = 0.3 * 0.9 + 0.7 * 0.1  # either is flipped, and not both
    assert float(both) == pytest.approx(-(1 - e) * math.log(s(m)) - e * math.log(s(-m)))


def test_chances_of_labels_come_with_the_batch():
    batch = batch_of([(2, 1), (1, 3)])
    batch.branches.per["doubt"] = torch.tensor([0.2, 0.2, 0.0, 0.0])
    made = sides(torch.zeros(7), batch)
    assert made.doubt.tolist() == pytest.approx([0.2, 0.0]) and "doubt" not in made.columns()
