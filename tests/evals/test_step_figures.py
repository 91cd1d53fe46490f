"""Figures of a process reward model: steps, first errors, and what ProcessBench measures."""

import numpy as np
import pytest

from llmkit.evals.steps import calibration, first_error, first_wrong, reported, tallies
from llmkit.stats.bins import calibration_error

FOUND = [
    (np.array([1, 1, 0]), np.array([0.9, 0.8, 0.1])),  # its wrong step is found
    (np.array([1, 0, 0]), np.array([0.9, 0.7, 0.2])),  # found too late
    (np.array([1, 1]), np.array([0.6, 0.9])),  # sound, and said to be
    (np.array([1]), np.array([0.3])),  # sound, and said not to be
]


def test_the_first_wrong_step_is_the_end_where_there_is_none():
    assert [first_wrong(labels) for labels, _ in FOUND] == [2, 1, 2, 1]


def test_figures_are_their_counts():
    made = {(r.metric, r.slice): r for r in reported(FOUND, list("abcd"), "valid", 0)}
    values = {(metric.partition(".")[2], part): r.value for (metric, part), r in made.items()}
    assert values["accuracy", "all"] == pytest.approx(7 / 9)
    assert values["accuracy", "wrong"] == pytest.approx(2 / 3) and values["accuracy", "right"] == pytest.approx(5 / 6)
    assert values["first_error", "flawed"] == 0.5 == values["first_error", "sound"] == values["first_error", "all"]
    assert values["first_error_f1", "all"] == 0.5
    chance, labels = (np.concatenate([one[i] for one in FOUND]) for i in (1, 0))
    assert values["brier", "all"] == pytest.approx(np.mean((chance - labels) ** 2))
    assert values["loss", "all"] == pytest.approx(-np.mean(np.log(np.where(labels, chance, 1 - chance))))
    assert made["valid.accuracy", "wrong"].n == 2  # solutions that have a wrong step


def test_who_says_that_all_is_right_finds_no_error():
    found = [(labels, np.full(len(labels), 0.99)) for labels, _ in FOUND]
    made = {(r.metric, r.slice): r.value for r in reported(found, list("abcd"), "valid", 0)}
    assert made["valid.first_error", "all"] == 0.5 and made["valid.first_error_f1", "all"] == 0.0
    assert float(first_error(tallies(found).sum(0))) == 0.5


def test_gaps_of_a_solution_stay_together():
    table = calibration(FOUND)
    assert len(table) == 4 and table[:, -1].tolist() == [3, 3, 2, 1]
    dice = np.random.default_rng(0)
    chance = [dice.random(5) for _ in range(2000)]
    found = [((dice.random(5) < p).astype(int), p) for p in chance]
    assert calibration_error(calibration(found).sum(0)) < 0.02
