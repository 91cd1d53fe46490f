"""What a student learns by: against closed forms, torch's own gradients, TRL, and what must not change it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.losses.distil import Divergence, coarse, mixture
from llmkit.losses.distil_node import ForwardKl, Jsd, ReverseKl
from llmkit.models.kept_laws import likeliest

LOSSES: dict[str, Any] = {
    "forward": ForwardKl(),
    "reverse": ReverseKl(),
    "jsd": Jsd(),
    "jsd 0.1": Jsd(beta=0.1),
    "jsd 0.9": Jsd(beta=0.9),
}


def logits(seed: int, rows: int = 7, words: int = 13) -> Tensor:
    torch.manual_seed(seed)
    return 2 * torch.randn(rows, words, dtype=torch.float64)


def whole(divergence: Divergence, teacher: Tensor, temperature: float) -> Any:
    law = torch.log_softmax(teacher / temperature, 1)
    return lambda scaled: divergence(scaled, law)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_that_torch_makes(name: str, share: float, temperature: float) -> None:
    student, teacher, labels = logits(1).requires_grad_(True), logits(2), torch.arange(7)
    compared = whole(LOSSES[name].divergence, teacher, temperature)
    losses, nll, slope = mixture(student.detach(), labels, compared, temperature, share)
    log_q, log_p = (torch.log_softmax(x / temperature, 1) for x in (student, teacher))
    q, p = log_q.exp(), log_p.exp()
    beta = getattr(LOSSES[name], "beta", 0.0)
    log_m = (beta * p + (1 - beta) * q).log()
    plain = {
        "forward": (p * (log_p - log_q)).sum(1),
        "reverse": (q * (log_q - log_p)).sum(1),
    }.get(name, beta * (p * (log_p - log_m)).sum(1) + (1 - beta) * (q * (log_q - log_m)).sum(1))
    hard = -torch.log_softmax(student, 1)[torch.arange(7), labels]
    total = (1 - share) * temperature**2 * plain + share * hard
    total.sum().backward()
    assert torch.allclose(losses, total.detach(), rtol=1e-12)
    assert torch.allclose(nll, hard.detach(), rtol=1e-12)
    assert student.grad is not None
    assert torch.allclose(slope, student.grad, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_forward_kl_is_the_temperature_times_the_difference_of_the_laws() -> None:
    student, teacher, heat = logits(1), logits(2), 3.0
    _, _, slope = mixture(student, torch.zeros(7, dtype=torch.long), whole(ForwardKl().divergence, teacher, heat), heat)
    assert torch.allclose(slope, heat * (torch.softmax(student / heat, 1) - torch.softmax(teacher / heat, 1)))


@pytest.mark.parametrize("name", LOSSES)
def test_who_teaches_itself_learns_nothing(name: str) -> None:
    same = logits(3)
    losses, _, slope = mixture(same, torch.arange(7), whole(LOSSES[name].divergence, same, 2.0), 2.0)
    assert float(losses.abs().max()) < 1e-14
    assert float(slope.abs().max()) < 1e-14


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_they_equal_trl_but_for_the_square_of_the_temperature(beta: float, temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits(4).float().requires_grad_(True), logits(5).float()
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], None, beta, temperature, "sum")
    theirs.backward()
    node: Any = {0.0: ForwardKl(), 1.0: ReverseKl()}.get(beta) or Jsd(beta=beta)
    compared = whole(node.divergence, teacher, temperature)
    losses, _, slope = mixture(student.detach(), torch.arange(7), compared, temperature)
    assert float(losses.sum()) / temperature**2 == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert student.grad is not None
    assert torch.allclose(slope / temperature**2, student.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_kept_laws_of_all_words_lose_nothing_and_of_some_are_no_further(name: str) -> None:
    student, teacher, divergence = logits(6), logits(7), LOSSES[name].divergence
    exact, slope = divergence(student, torch.log_softmax(teacher, 1))
    before = torch.zeros_like(exact)
    for top_k in (1, 4, 12, 13):
        ids, law = likeliest(teacher, top_k, 1.0)
        losses, slopes = coarse(student, ids, law, divergence)
        assert bool((losses <= exact + 1e-12).all()) and bool((losses >= before - 1e-12).all())
        before = losses
    assert torch.allclose(before, exact)
    assert torch.allclose(slopes, slope)


@pytest.mark.parametrize("name", LOSSES)
def test_the_rest_counts_as_one_word_with_its_gradient(name: str) -> None:
    student, teacher, divergence = logits(8).requires_grad_(True), logits(9), LOSSES[name].divergence
    ids, law = likeliest(teacher, 3, 1.0)
    losses, slope = coarse(student.detach(), ids, law, divergence)
    q = torch.softmax(student, 1)
    chosen = q.gather(1, ids)
    log_q = torch.cat([chosen, 1 - chosen.sum(1, keepdim=True)], 1).log()
    plain, by = divergence(log_q.detach(), law)
    assert torch.allclose(losses, plain)
    log_q.backward(by)  # the softmax of log q is q: its gradient by logits is that by log q
    assert student.grad is not None
    assert torch.allclose(slope, student.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_shift_of_logits_changes_nothing_and_far_ones_stay_finite(name: str) -> None:
    student, teacher, made = logits(1), logits(2), partial(mixture, labels=torch.arange(7), temperature=1.5)
    divergence = LOSSES[name].divergence
    plain = made(student, compared=whole(divergence, teacher, 1.5))
    moved = made(student + 50, compared=whole(divergence, teacher - 30, 1.5))
    assert all(torch.allclose(a, b) for a, b in zip(plain, moved, strict=True))
    far = made(student.float() * 300, compared=whole(divergence, teacher.float() * -300, 1.5))
    assert all(bool(part.isfinite().all()) for part in far)
