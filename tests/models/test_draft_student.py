"""A small model beside its teacher: the sum that it learns from is that of whole logits, and so are its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkit.core.types import Batch, Packed, Segment
from llmkit.losses.distil import forward_kl
from llmkit.models import foretold
from llmkit.models.attend import install
from llmkit.models.draft_student import DRAFTS, Student, in_turn
from llmkit.models.heads import Scored, shape_of
from tests.conftest import make_model

SIZES: tuple[tuple[int, ...], ...] = ((5, 9), (14,), (1, 3, 4))


def batch(lengths: tuple[int, ...]) -> Batch:
    torch.manual_seed(sum(lengths))
    size = sum(lengths)
    ends = [sum(lengths[: at + 1]) for at in range(len(lengths))]
    segments = tuple(Segment(0, end - length, end) for end, length in zip(ends, lengths, strict=True))
    tokens = torch.randint(3, 440, (1, size))
    weights = (torch.rand(1, size) < 0.7).float() * 0.5
    weights[0, [end - 1 for end in ends]] = 0
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return Batch(tokens, positions, tokens.roll(-1, 1), weights, Packed(segments), tuple(range(len(lengths))))


def model(seed: int, **more: Any) -> Any:
    made = make_model(seed, initializer_range=0.2, **more)
    install(made, "sdpa")
    return made


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lengths", SIZES)
def test_it_equals_whole_logits_with_gradients(lengths: tuple[int, ...], tied: bool) -> None:
    small, teacher = model(1, num_hidden_layers=1, tie_word_embeddings=tied), model(2)
    given, scored = batch(lengths), Student(small, Scored(teacher), forward_kl)
    made = scored(given)
    (made.losses[0] * 3).backward()
    ours = {name: p.grad.clone() for name, p in small.named_parameters()}
    small.zero_grad()
    context = {"position_ids": given.positions, "attend": given.attend, "use_cache": False}
    logits = small(input_ids=given.tokens, **context).logits[0]
    with torch.no_grad():
        law = torch.softmax(teacher(input_ids=given.tokens, **context).logits[0], 1)
    divergence = (law * (law.log() - torch.log_softmax(logits, 1))).sum(1)
    plain = (divergence * given.weights[0]).sum()
    (plain * 3).backward()
    assert torch.allclose(made.losses[0], plain, rtol=1e-5)
    for name, p in small.named_parameters():
        assert torch.allclose(ours[name], p.grad, rtol=1e-4, atol=1e-6 * float(p.grad.abs().max() + 1e-3)), name
    common = torch.minimum(law, torch.softmax(logits, 1)).sum(1) * given.weights[0]
    assert torch.allclose(made.kept[0], common.sum(), rtol=1e-5)
    assert float(made.counts[0]) == float(given.weights.sum())
    chosen = given.weights[0] != 0
    assert made.right[:, 0].tolist() == (logits.argmax(1) == given.labels[0])[chosen].tolist()
    assert all(p.grad is None for p in teacher.parameters())


def test_under_autocast_it_learns_the_same_but_for_what_16_bits_round() -> None:
    given, found = batch((9, 14)), []
    for mixed in (False, True):
        small = model(1, num_hidden_layers=1)
        scored = Student(small, Scored(model(2)), forward_kl)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            made = scored(given)
        made.losses[0].backward()
        found.append((float(made.losses[0].detach()), torch.cat([p.grad.flatten() for p in small.parameters()])))
    (plain, exact), (rounded, near) = found
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.02)
    assert torch.nn.functional.cosine_similarity(exact, near, 0) > 0.99


def test_what_is_evaluated_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain = list[int](), foretold._add
    monkeypatch.setattr(foretold, "_add", lambda *block: (made.append(1), plain(*block)))
    scored = Student(model(1, num_hidden_layers=1), Scored(model(2)), forward_kl)
    with torch.no_grad():
        scored(batch((9,)))
    assert not made
    scored(batch((9,)))
    assert made


def test_a_teacher_teaches_itself_nothing() -> None:
    teacher = model(2)
    made = Student(model(2), Scored(teacher), forward_kl)(batch((9, 9)))
    assert abs(float(made.losses[0].detach())) < 1e-5
    assert float(made.kept[0] / made.counts[0]) == pytest.approx(1.0, abs=1e-5)


def test_a_family_that_caps_its_logits_has_the_slope_of_the_cap() -> None:
    from llmkit.models.families import tiny

    small, teacher = tiny("Gemma-2"), tiny("Gemma-2")
    assert shape_of(small.config).cap
    for one in (small, teacher):
        install(one, "sdpa")
    with torch.no_grad():
        for p in small.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    words = int(small.config.vocab_size)
    given = batch((6,))
    given = Batch(given.tokens % words, given.positions, given.labels % words, given.weights, given.attend, given.ids)
    Student(small, Scored(teacher), forward_kl)(given).losses[0].backward()
    ours = {name: p.grad.clone() for name, p in small.named_parameters()}
    small.zero_grad()
    context = {"position_ids": given.positions, "attend": given.attend, "use_cache": False}
    logits = small(input_ids=given.tokens, **context).logits[0]
    with torch.no_grad():
        law = torch.softmax(teacher(input_ids=given.tokens, **context).logits[0], 1)
    ((law * (law.log() - torch.log_softmax(logits, 1))).sum(1) * given.weights[0]).sum().backward()
    for name, p in small.named_parameters():
        assert torch.allclose(ours[name], p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max() + 1e-3)), name


def test_drafts_in_turn_are_right_while_those_before_them_are() -> None:
    rows = torch.tensor([3, 4, 5, 9, 10])
    right = torch.tensor([True, True, False, True, True])
    made = in_turn(rows, right)
    assert made.shape == (5, DRAFTS)
    assert made.sum(1).tolist() == [2, 1, 0, 2, 1]  # not from one answer on to the next
    assert in_turn(rows[:0], right[:0]).shape == (0, DRAFTS)
