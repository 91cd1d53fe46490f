"""The certificate passes rules that are right, and refuses each known defect of those that look at drafts by ratios.

Rules are written out here as functions of the numbers that they draw by, and their laws worked out without a draw.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from llmkit.cli.acceptance.verdict import Check
from llmkit.cli.speculation import closed
from llmkit.inference.place import Place
from llmkit.inference.request import Token
from llmkit.inference.sampling import Sampling
from llmkit.inference.speculation.certificate import apart, law_of, likely, overlap, pieces
from llmkit.inference.speculation.toy import PROMPT, WORDS, Case, Numbers, Run, Toy, installed, made, plainly, target

Law = NDArray[np.float64]
HOT = Sampling(temperature=1.5)
TOY, OTHER = Toy(3), Toy(4)
COUNT = 2
"""Tokens of a text, of which the first is drafted."""


def own(text: list[int], sampling: Sampling = HOT, toy: Toy = TOY) -> Law:
    return closed.by_model(toy, sampling)([*PROMPT, *text])


def draw(law: Law, number: float) -> int:
    """By one number; a law need not sum to 1."""
    return min(int(np.searchsorted(np.cumsum(law) / law.sum(), number, side="right")), WORDS - 1)


def ratio(
    numbers: Numbers,
    q: Law | None = None,
    shared: bool = False,
    residual: Callable[[Law, Law], Law] = lambda p, q: np.maximum(p - q, 0),
    bonus: Callable[[int], list[int]] = lambda token: [token],
) -> Run:
    """Chain of one draft by Leviathan et al. (arXiv:2211.17192): kept when u < p / q, else drawn from what is left of p
    without q; a token more after it. `q`: what is divided by, where it is not what the draft was drawn from."""
    p, drawn_from = own([]), own([], HOT, OTHER)
    q = drawn_from if q is None else q
    draft = draw(drawn_from, numbers[0])
    kept = numbers[0 if shared else 1] * q[draft] < p[draft]
    token = draft if kept else draw(residual(p, q), numbers[2])
    last = draw(own(bonus(token)), numbers[3])
    return Run((token, last), (draft if not shared else (draft, kept), kept, token, last))


def unscaled(p: Law, q: Law) -> Law:
    """What is left is drawn from as it is, and what it lacks falls to the last word."""
    left = np.maximum(p - q, 0)
    left[-1] += 1 - left.sum()
    return left


RULES: dict[str, Callable[[Numbers], Run]] = {
    "q before its temperature": partial(ratio, q=own([], Sampling(temperature=1.0), OTHER)),
    "noise that draft and test share": partial(ratio, shared=True),
    "what is left is not scaled to 1": partial(ratio, residual=unscaled),
    "p itself after a refusal": partial(ratio, residual=lambda p, q: p),
    "what is left of another row": partial(ratio, residual=lambda p, q: np.maximum(own([0]) - q, 0)),
    "the row after the wrong token": partial(ratio, bonus=lambda token: [(token + 1) % WORDS]),
    "the row before": partial(ratio, bonus=lambda token: []),
}


def gap(rule: Callable[[Numbers], Run]) -> float:
    return apart(law_of(rule, 4), target(TOY, HOT, COUNT))


def test_the_ratio_rule_is_right() -> None:
    assert gap(ratio) < closed.EXACT


@pytest.mark.parametrize("name", RULES)
def test_a_defect_of_the_ratio_rule_is_refused(name: str) -> None:
    assert gap(RULES[name]) > 1e-3


def unseen(self: Place, token: Token) -> bool:
    """A draft is taken wherever it was possible at all."""
    at = len(self.made)
    self.made.append(token)
    if at == len(self.drafts):
        return False
    self.sequence.tokens[-1] = self.drafts[at]
    return True


def test_drafts_that_are_taken_unseen_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("", HOT, closed.drawn_by(closed.by_model(OTHER, HOT)))
    right = law_of(partial(made, TOY, case, choose=installed), COUNT)
    assert apart(right, target(TOY, HOT, COUNT)) < closed.ROUNDED
    monkeypatch.setattr(Place, "take", unseen)
    assert apart(law_of(partial(made, TOY, case, choose=plainly), COUNT), target(TOY, HOT, COUNT)) > 1e-3


def test_what_hangs_on_later_numbers_is_no_law() -> None:
    def run(numbers: Numbers) -> Run:
        first = int(numbers[0] < 0.5) if numbers[1] < 0.7 else 0
        return Run((first, 0), (first, 0))

    assert law_of(run, 2)[()] > 0.1


def test_the_whole_of_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    some = {name: closed.SAMPLINGS[name] for name in ("min_p, penalties",)}
    monkeypatch.setattr(closed, "SAMPLINGS", some)
    monkeypatch.setattr(closed, "LENGTH", COUNT)
    checks: list[Check] = list(closed.law(7))
    assert [check.status for check in checks] == ["passed"] * 3, checks
    assert "5 cases" in checks[0].why


def test_drafts_are_kept_as_often_as_both_laws_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed, "LENGTH", COUNT)
    checks = list(closed.kept(7))
    assert [check.status for check in checks] == ["passed"] * 2, checks
    monkeypatch.setattr(closed, "overlap", likely)  # the control: what no coupling by one number reaches here
    assert next(iter(closed.kept(7))).status == "failed"


def test_closed_forms() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    assert (overlap(p, q), likely(p, q)) == (0.25, 0.5)
    assert overlap(p, p) == likely(p, p) == 1
    ends = [(low, high) for low, high, _ in pieces(lambda at: (at < 0.3, at < 0.31))]
    assert np.allclose(ends, [(0, 0.3), (0.3, 0.31), (0.31, 1)], atol=1e-11)
    assert ends == [(low, high) for low, high, _ in pieces(lambda at: (at < 0.3, at < 0.31), [ends[1][0], 0.7])]
