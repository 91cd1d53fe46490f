"""A student beside its teacher: sums and gradients are those of whole logits, whatever its head is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmkit.losses.distil import coarse, mixture
from llmkit.losses.distil_node import Jsd
from llmkit.models.distilled import Distilled
from llmkit.models.heads import Scored
from llmkit.models.kept_laws import KeptLaws, likeliest
from llmkit.models.teacher import Teacher
from tests.models.test_draft_student import batch, model

LOSS = Jsd(beta=0.3)
HEADS = ("tied", "own", "adapted")


def student(head: str) -> Any:
    made = model(1, num_hidden_layers=1, tie_word_embeddings=head == "tied")
    if head != "adapted":
        return made
    torch.manual_seed(5)
    adapted = get_peft_model(made, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    return adapted


def beside(small: Any, teacher: Any, words: int | None = None, heat: float = 1.7) -> Distilled:
    said = Teacher(Scored(teacher))

    def say(given: Any, chosen: Any) -> Any:
        logits = said.logits(given, chosen)

        def told(here: slice) -> Any:
            law = torch.log_softmax(logits(here)[:, : words or 448] / heat, 1)
            return lambda scaled: LOSS.divergence(scaled, law)

        return told

    return Distilled(small, say, partial(mixture, temperature=heat, share=0.25), words)


def plain(small: Any, teacher: Any, given: Any, words: int = 448, heat: float = 1.7) -> tuple[Any, Any]:
    context = {"position_ids": given.positions, "attend": given.attend, "use_cache": False}
    logits = small(input_ids=given.tokens, **context).logits[0][:, :words]
    with torch.no_grad():
        log_p = torch.log_softmax(teacher(input_ids=given.tokens, **context).logits[0][:, :words] / heat, 1)
    log_q = torch.log_softmax(logits / heat, 1)
    log_m = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
    far = 0.3 * (log_p.exp() * (log_p - log_m)).sum(1) + 0.7 * (log_q.exp() * (log_q - log_m)).sum(1)
    nll = torch.nn.functional.cross_entropy(logits, given.labels[0], reduction="none")
    weights = given.weights[0]
    return ((0.75 * heat**2 * far + 0.25 * nll) * weights).sum(), (nll * weights).sum()


@pytest.mark.parametrize("words", [448, 440])
@pytest.mark.parametrize("head", HEADS)
def test_it_equals_whole_logits_with_gradients(head: str, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.models import distilled

    monkeypatch.setitem(distilled.ROWS, "cpu", 6)  # several blocks
    small, teacher, given = student(head), model(2), batch((5, 9))
    made = beside(small, teacher, words)(given)
    (made.loss * 3).backward()
    ours = {name: p.grad.clone() for name, p in small.named_parameters() if p.grad is not None}
    small.zero_grad()
    loss, nll = plain(small, teacher, given, words)
    (loss * 3).backward()
    assert torch.allclose(made.loss, loss, rtol=1e-5) and torch.allclose(made.nll, nll, rtol=1e-5)
    theirs = {name: p.grad for name, p in small.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert torch.allclose(ours[name], grad, rtol=1e-4, atol=2e-6 * float(grad.abs().max() + 1e-3)), name
    assert all(p.grad is None for p in teacher.parameters())


def test_one_that_is_its_own_teacher_is_at_rest() -> None:
    small = model(2)
    said = beside(small, model(2), heat=2.0)
    said.mixture = partial(mixture, temperature=2.0)
    loss = said(batch((9, 9))).loss
    loss.backward()
    assert abs(float(loss.detach())) < 1e-5
    assert max(float(p.grad.abs().max()) for p in small.parameters()) < 1e-5


def test_laws_that_were_kept_are_those_of_the_teacher(tmp_path: Path) -> None:
    small, given, heat = student("own"), batch((5, 9)), 1.7
    teacher, laws = Teacher(Scored(model(2))), KeptLaws(tmp_path / "teacher", 448, 448, "one")
    assert laws.lacks(given)
    chosen = (given.weights != 0).nonzero(as_tuple=True)
    laws.put(given, *likeliest(teacher.logits(given, chosen)(slice(0, 99)), 448, heat))
    again = KeptLaws(tmp_path / "teacher", 448, 448, "one")
    assert not again.lacks(given)
    assert KeptLaws(tmp_path / "teacher", 448, 448, "another").lacks(given)

    def say(some: Any, _: Any) -> Any:
        found = laws.of(some)
        return lambda here: lambda scaled: coarse(scaled, *found(here), LOSS.divergence)

    kept = Distilled(small, say, partial(mixture, temperature=heat, share=0.25))(given)
    assert torch.allclose(kept.loss, beside(small, model(2))(given).loss, rtol=1e-5)
