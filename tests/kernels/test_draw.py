"""Draws without a sort are those of a sort, whatever is drawn beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llmkit_kernels.build import lacks
from llmkit_kernels.draw import Asked, draw, likeliest, reference

pytestmark = pytest.mark.skipif(bool(lacks("draw")), reason=lacks("draw"))
HOW = [(1.0, 0.0), (0.9, 0.0), (0.5, 0.0), (1e-9, 0.0), (0.999, 0.0), (1.0, 0.05), (1.0, 1.0), (0.95, 0.01)]


def laws() -> list[np.ndarray]:
    numbers, made = np.random.default_rng(0), []
    for words in (1, 2, 15, 16, 17, 256, 257, 1000, 9000):
        for spread in (0.01, 1.0, 12.0):
            law = (numbers.standard_normal(words) * spread).astype(np.float32)
            law[1:][numbers.random(words - 1) < 0.1] = -np.inf
            made.append(law)
        made.append(np.round(numbers.standard_normal(words)).astype(np.float32))  # with many that are equal
    return made


@pytest.mark.parametrize(("top_p", "min_p"), HOW)
def test_a_draw_is_that_of_the_plain_row(top_p: float, min_p: float) -> None:
    ats, missed, count = np.linspace(0, 1, 11, endpoint=False), 0, 0
    for law in laws():
        for sharp in (1.0, 3.0):
            got = draw([Asked(law, sharp, top_p, min_p, float(at)) for at in ats])
            for at, (place, mass) in zip(ats, got, strict=True):
                want, whole = reference.draw(law, sharp, top_p, min_p, float(at))
                assert mass == pytest.approx(whole, rel=2e-5, abs=0) or top_p < 1
                missed, count = missed + (place != want), count + 1
                assert law[place] > -np.inf
    assert missed <= count / 200  # where `at` lies on the border of two tokens, by rounding


def test_of_equal_weights_the_first_are_kept_and_no_more_than_are_needed() -> None:
    even = np.zeros(4096, np.float32)
    ends = draw([Asked(even, 1.0, 0.25, 0.0, at) for at in (0.0, np.nextafter(1.0, 0))])
    assert ends == [(0, 1024.0), (1023, 1024.0)]
    two = np.log(np.array([1, 3, 3, 3, 0.5], np.float32))
    assert [place for place, _ in draw([Asked(two, 1.0, 0.5, 0.0, at) for at in (0.0, 0.49, 0.51, 0.99)])] == [
        1,
        1,
        2,
        2,
    ]


def test_a_place_without_weight_is_never_drawn() -> None:
    law = np.full(1000, -np.inf, np.float32)
    law[[3, 300, 700]] = 0.0
    ats = [0.0, 1 / 3, 2 / 3, float(np.nextafter(1.0, 0))]
    assert {place for place, _ in draw([Asked(law, 1.0, 1.0, 0.0, at) for at in ats])} == {3, 300, 700}
    cold = np.array([0.0, -1e-3, 5.0], np.float32)
    assert draw([Asked(cold, 1e30, 0.9, 0.1, 0.999)]) == [(2, 1.0)]


def test_a_row_is_alone_and_threads_move_nothing() -> None:
    asked = [Asked(law, 1.0, *how, 0.7) for law in laws() for how in HOW]
    alone = [draw([one])[0] for one in asked]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert draw(asked) == alone and draw(asked[::-1]) == alone[::-1]
    finally:
        torch.set_num_threads(before)


def test_what_is_no_law_is_refused() -> None:
    for law in (np.zeros(4), np.zeros(8, np.float32)[::2], np.zeros(0, np.float32)):
        with pytest.raises(ValueError, match="end to end"):
            draw([Asked(law, 1.0, 1.0, 0.0, 0.5)])


@pytest.mark.parametrize("words", [1, 8, 9, 127, 128, 129, 300, 1000, 5003])
@pytest.mark.parametrize("kind", ["any", "equal", "rising", "falling", "none"])
def test_the_likeliest_are_those_of_a_sort(words: int, kind: str) -> None:
    rows = np.random.default_rng(words).standard_normal((5, words)).astype(np.float32)
    rows[:, ::7] = -np.inf
    rows = {"any": rows, "equal": np.round(rows), "rising": np.sort(rows), "falling": -np.sort(-rows)}.get(
        kind, np.full_like(rows, -np.inf)
    )
    for count in {1, min(8, words)}:
        assert (likeliest(np.ascontiguousarray(rows), count) == reference.likeliest(rows, count)).all()


def test_rows_that_are_none_are_refused() -> None:
    rows = np.zeros((2, 4), np.float32)
    for wrong, count in ((rows, 5), (rows, 0), (rows.T, 1), (rows.astype(np.float64), 1)):
        with pytest.raises(ValueError, match="rows are fp32, end to end"):
            likeliest(wrong, count)
    assert likeliest(rows[:0], 2).shape == (0, 2)
