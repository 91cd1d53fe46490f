"""What a step is taken to take: near what was measured, rising, and not thrown off by what took long for once."""

from __future__ import annotations

import random

import pytest

from llmkit.inference.speculation.costs import Costs


def seen(steps: int, noise: float, seed: int = 0) -> Costs:
    """Steps of 1 to 40 tokens that take 40 ms and 1 ms a token, so to say."""
    drawn, costs = random.Random(seed), Costs()
    for _ in range(steps):
        size = drawn.randint(1, 40)
        costs.see(size, (0.04 + 0.001 * size) * (1 + noise * drawn.random()))
    return costs


def test_nothing_is_known_at_first() -> None:
    assert Costs().of(5) == 0.0


def test_one_step_tells_of_more_by_a_guess() -> None:
    costs = Costs()
    costs.see(4, 0.1)
    assert costs.of(1) == costs.of(4) == 0.1
    assert costs.of(4) < costs.of(5) < costs.of(20)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_it_is_near_what_is_measured(noise: float) -> None:
    costs = seen(2000, noise)
    for size in (1, 5, 13, 27, 32):
        assert costs.of(size) == pytest.approx((0.04 + 0.001 * size) * (1 + noise / 2), rel=0.02 + noise / 3)
    assert costs.of(80) == pytest.approx(0.12 * (1 + noise / 2), rel=0.05 + noise)


@pytest.mark.parametrize("seed", range(5))
def test_more_tokens_never_take_less(seed: int) -> None:
    costs = seen(300, 1.5, seed)
    known = [costs.of(size) for size in range(1, 100)]
    assert known == sorted(known)


def test_a_single_long_step_is_soon_forgotten() -> None:
    costs = seen(400, 0.0)
    before = costs.of(12)
    costs.see(12, 3.0)
    for _ in range(16):
        costs.see(12, 0.052)
    assert costs.of(12) < 1.15 * before
    assert costs.of(8) < 1.15 * costs.of(7)


def test_what_changed_for_good_is_learned() -> None:
    costs = seen(400, 0.0)
    for _ in range(100):
        for size in (1, 8, 16):
            costs.see(size, 0.2)
    assert costs.of(1) == pytest.approx(0.2, rel=0.1)
