"""Figures of a classifier: by hand, and their intervals."""

import numpy as np
import pytest

from llmkit.core.errors import DataError
from llmkit.evals.classify import (
    BINS,
    calibration,
    calibration_error,
    f1_of,
    is_chunks,
    macro_f1,
    spans,
    spans_of,
    tallies,
)
from llmkit.stats.bootstrap import of_sums, ratio


def test_macro_f1_is_the_mean_over_classes_that_are_there_or_were_said():
    is_, said = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    each = [2 * 2 / (3 + 4), 2 * 1 / (2 + 2), 0.0]
    assert macro_f1(tallies(is_, said, 4).sum(0)) == pytest.approx(np.mean(each))  # the fourth class is nowhere
    many = np.stack([tallies(is_, said, 3).sum(0), tallies(is_, is_, 3).sum(0)])
    assert macro_f1(many) == pytest.approx([np.mean(each), 1.0])


def test_calibration_error_by_hand():
    chances = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.5, 0.5]])
    found = calibration(np.array([0, 1, 1, 0]), np.log(chances))
    assert float(calibration_error(found.sum(0))) == pytest.approx((abs(1.8 - 1) + abs(0.6 - 1) + abs(0.5 - 1)) / 4)
    assert found.shape == (4, BINS + 1)


def test_spans_are_read_as_conll_does():
    tags = ["B-X", "I-X", "I-Y", "O", "I-X", "B-X", "B-X"]
    assert spans(tags) == {(0, 1, "X"), (2, 2, "Y"), (4, 4, "X"), (5, 5, "X"), (6, 6, "X")}
    assert spans(["O", "O"]) == set() and spans(["B-X"]) == {(0, 0, "X")}
    names = ("O", "B-X", "I-X")
    assert is_chunks(names) and not is_chunks(("N", "V"))
    sums = spans_of(np.array([1, 2, 0, 1]), np.array([1, 0, 0, 1]), names)
    assert sums.tolist() == [1, 2, 2] and f1_of(sums) == 0.5


def test_intervals_of_sums_are_those_of_ratios_and_cover():
    rng = np.random.default_rng(0)
    clusters = [str(i // 3) for i in range(120)]
    top = (rng.random(120) < 0.7).astype(float)
    columns = np.stack([top, np.ones(120)], 1)

    def figure(sums):
        return sums[..., 0] / sums[..., 1]

    assert of_sums("a", columns, figure, clusters, 4) == ratio("a", top, None, clusters, seed=4)
    assert of_sums("a", columns[:3], figure, clusters[:3]).low is None  # one cluster says nothing of how it varies
    with pytest.raises(DataError, match="nothing to measure"):
        of_sums("a", columns[:0], figure, [])
    inside = 0
    for _ in range(30):
        is_ = rng.integers(0, 2, 150)
        said = np.where(rng.random(150) < 0.8, is_, 1 - is_)
        made = of_sums("f1", tallies(is_, said, 2), macro_f1, list(map(str, range(150))))
        inside += made.low <= 0.8 <= made.high
    assert inside >= 25
