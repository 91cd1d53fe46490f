"""Figures of scores over pairs: what is known of length alone, calibration, and closed forms."""

import numpy as np
import pytest

from llmkit.evals.pair_figures import Pairs, figures, reports
from llmkit.stats.bins import calibration_error, edges, gaps, placed


def drawn(n=400, of_length=0.0, of_worth=1.0, seed=0):
    """Scores that are partly an answer's length, partly its worth; the chosen answer has more worth."""
    dice = np.random.default_rng(seed)
    long_up, long_down = dice.integers(5, 200, n).astype(float), dice.integers(5, 200, n).astype(float)
    worth = np.abs(dice.normal(0, 1, n))
    up = of_worth * worth + of_length * long_up + dice.normal(0, 1, n)
    return Pairs(up, of_length * long_down + dice.normal(0, 1, n), long_up, long_down)


def test_who_prefers_the_longer_answer_is_right_half_of_the_time_once_length_is_held_fixed():
    dice = np.random.default_rng(0)
    long_down = dice.integers(5, 100, 300).astype(float)
    long_up = long_down + dice.choice([7.0, 7.0, 7.0, -3.0], 300)  # the longer is the chosen one in most pairs
    made = figures(Pairs(long_up, long_down, long_up, long_down))
    assert made["accuracy"] == made["length_accuracy"] > 0.65
    assert made["length_controlled_accuracy"] == 0.5
    assert made["length_correlation"] == pytest.approx(1) == made["margin_length_correlation"]


def test_figures_are_their_formulas():
    pairs = drawn(of_length=0.01)
    made, gap, longer = figures(pairs), pairs.up - pairs.down, pairs.long_up - pairs.long_down
    assert made["accuracy"] == np.mean(gap > 0) and made["reward_margin"] == pytest.approx(gap.mean())
    assert made["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-gap))))
    assert made["brier"] == pytest.approx(np.mean((1 - 1 / (1 + np.exp(-gap))) ** 2))
    assert made["margin_length_correlation"] == pytest.approx(np.corrcoef(gap, longer)[0, 1])
    scores, lengths = np.r_[pairs.up, pairs.down], np.r_[pairs.long_up, pairs.long_down]
    assert made["length_correlation"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1])
    right = [np.mean(gap[longer > 0] > 0), np.mean(gap[longer < 0] > 0)]
    assert made["length_controlled_accuracy"] == pytest.approx(np.mean(right))


def test_ties_count_half_and_what_cannot_be_measured_is_left_out():
    alike = Pairs(*np.ones((4, 5)))
    made = figures(alike)
    assert made["accuracy"] == made["length_accuracy"] == 0.5
    assert not {"length_correlation", "length_controlled_accuracy"} & made.keys()
    assert not [r for r in reports("valid", alike, list("abcde"), 0) if "correlation" in r.metric]


def test_chances_that_are_so_are_calibrated_and_others_are_not():
    dice = np.random.default_rng(1)
    gap = dice.normal(0, 2, 20000)
    flipped = dice.random(20000) > 1 / (1 + np.exp(-gap))  # a draw by the chance says which is chosen
    gap = np.where(flipped, -gap, gap)
    length, none = np.ones(20000), np.zeros(20000)
    assert figures(Pairs(gap, none, length, length))["ece"] < 0.02
    assert figures(Pairs(3 * gap, none, length, length))["ece"] > 0.1


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Accuracy over clusters of four pairs with one fate: 95 % of the intervals hold what is so, and one that took the
    pairs for independent would hold it much more rarely."""
    met = 0
    for seed in range(80):
        dice = np.random.default_rng(seed)
        gap = np.repeat(np.where(dice.random(60) < 0.7, 1.0, -1.0), 4) + dice.normal(0, 0.1, 240)
        one = Pairs(gap, np.zeros(240), dice.random(240), dice.random(240))
        made = {r.metric: r for r in reports("valid", one, [str(i // 4) for i in range(240)], seed)}["valid.accuracy"]
        met += made.low <= 0.7 <= made.high
    assert 69 <= met <= 80


def test_reports_say_how_far_scores_are_beyond_length():
    pairs = drawn()
    made = {r.metric: r for r in reports("valid", pairs, [str(i) for i in range(400)], 0)}
    beyond = made["valid.accuracy_beyond_length"]
    assert beyond.value == pytest.approx(made["valid.accuracy"].value - made["valid.length_accuracy"].value)
    assert all(r.low <= r.value <= r.high and r.n == 400 for r in made.values())


def test_bins_hold_equally_many_and_equal_values_share_one():
    values = np.random.default_rng(0).normal(size=1000)
    found = edges(values, 10)
    assert np.bincount(placed(values, found)).tolist() == [100] * 10
    np.testing.assert_allclose(found, np.percentile(values, np.arange(10, 100, 10)))
    assert len(edges(np.ones(50), 10)) == 0
    few = np.repeat([0.1, 0.9], [90, 10])
    assert placed(few, edges(few, 10)).max() <= 1


def test_the_error_of_calibration_is_the_mean_gap():
    said, was = np.array([0.9, 0.9, 0.6, 0.6]), np.array([1.0, 0.0, 1.0, 1.0])
    table = gaps(said, was, edges(said, 2))
    assert calibration_error(table.sum(0)) == pytest.approx((0.8 + 0.8) / 4)
