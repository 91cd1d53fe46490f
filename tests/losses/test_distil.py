"""The losses of a small model against their closed forms, and their gradients against those that torch makes."""

from __future__ import annotations

import math

import pytest
import torch

from llmkit.losses.distil import forward_kl, overlap


def laws(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(7, 11, dtype=torch.float64), torch.softmax(2 * torch.randn(7, 11, dtype=torch.float64), 1)


def test_the_divergence_of_two_words_is_what_it_says() -> None:
    logits = torch.tensor([[math.log(0.25), math.log(0.75)], [0.0, 0.0], [3.0, 3.0]], dtype=torch.float64)
    law = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    losses, _ = forward_kl(logits, law)
    wanted = [0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), math.log(2), 0.0]
    assert torch.allclose(losses, torch.tensor(wanted, dtype=torch.float64), atol=1e-12)


def test_it_is_what_torch_calls_it_and_never_negative() -> None:
    logits, law = laws()
    theirs = torch.nn.functional.kl_div(torch.log_softmax(logits, 1), law, reduction="none").sum(1)
    losses, _ = forward_kl(logits, law)
    assert torch.allclose(losses, theirs, atol=1e-12)
    assert float(losses.min()) >= 0
    assert float(forward_kl(law.log(), law)[0].abs().max()) < 1e-12


@pytest.mark.parametrize("rule", [forward_kl, overlap])
def test_gradients_are_those_of_the_loss(rule) -> None:  # type: ignore[no-untyped-def]
    logits, law = laws(1)
    logits.requires_grad_(True)
    if rule is forward_kl:
        plain = (law * (law.log() - torch.log_softmax(logits, 1))).sum(1)
    else:
        plain = -torch.minimum(law, torch.softmax(logits, 1)).sum(1).log()
    plain.sum().backward()
    losses, slope = rule(logits.detach(), law)
    assert torch.allclose(losses, plain.detach(), atol=1e-12)
    assert logits.grad is not None
    assert torch.allclose(slope, logits.grad, atol=1e-12)
