"""Intervals against scipy, simulation, and degenerate cases."""

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from llmkit.core.errors import DataError
from llmkit.stats.bootstrap import difference, ratio


def test_a_mean_has_scipys_bca_interval():
    values = np.random.default_rng(0).gamma(2.0, size=80)
    ours = ratio("m", values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9999, random_state=1, method="BCa").confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(values.mean())
    assert abs(ours.low - theirs.low) < 0.08 * width and abs(ours.high - theirs.high) < 0.08 * width


def test_intervals_cover_a_ratio_about_as_often_as_they_say():
    rng, inside = np.random.default_rng(1), 0
    for trial in range(200):
        bottom = rng.integers(5, 40, size=60).astype(float)
        top = bottom * rng.normal(2.0, 0.5, size=60)
        report = ratio("nll", top, bottom, transform=np.exp, seed=trial)
        inside += report.low <= np.exp(2.0) <= report.high
    assert 0.89 <= inside / 200 <= 0.99


def test_clusters_widen_what_their_members_share():
    rng = np.random.default_rng(2)
    shared = np.repeat(rng.normal(size=20), 10)
    values, names = shared + 0.1 * rng.normal(size=200), [f"c{i // 10}" for i in range(200)]
    alone, together = ratio("m", values), ratio("m", values, clusters=names)
    assert together.high - together.low > 2 * (alone.high - alone.low)
    assert together.n == 200


def test_a_paired_difference_is_sharper_than_two_intervals():
    rng = np.random.default_rng(3)
    old = rng.gamma(2.0, size=100)
    new = old - 0.1 + 0.01 * rng.normal(size=100)
    change = difference("m", (new, None), (old, None))
    assert change.high < 0 and change.high - change.low < 0.02
    assert ratio("m", new).high > ratio("m", old).low


def test_small_equal_and_empty():
    one = ratio("m", [3.0])
    assert (one.low, one.value, one.high, one.n) == (None, 3.0, None, 1)
    alike = ratio("m", [1.0, 2.0, 3.0], clusters=["a"] * 3)
    assert (alike.low, alike.value, alike.high, alike.n) == (None, 2.0, None, 3)
    change = difference("m", ([1.0, 2.0], None), ([1.0, 1.0], None), ["a"] * 2)
    assert (change.low, change.value, change.high) == (None, 0.5, None)
    same = ratio("m", [2.0] * 9)
    assert (same.low, same.high) == (2.0, 2.0)
    with pytest.raises(DataError, match="nothing to measure"):
        ratio("m", [])
    with pytest.raises(DataError, match="not of the same examples"):
        difference("m", ([1.0], None), ([1.0, 2.0], None))


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).normal(size=50)
    assert ratio("m", values, seed=5) == ratio("m", values, seed=5) != ratio("m", values, seed=6)


def test_resamples_are_held_a_few_at_a_time_and_are_the_same_in_any_portion(monkeypatch):
    values = np.random.default_rng(0).normal(size=5000)
    tracemalloc.start()
    whole = ratio("m", values, values + 9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6 < 2000 * 5000 * 8  # of one array of all resamples
    monkeypatch.setattr("llmkit.stats.bootstrap.AT_ONCE", 5000 * 7)
    assert ratio("m", values, values + 9) == whole
