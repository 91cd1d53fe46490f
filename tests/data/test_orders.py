"""Balanced and bucketed orders: what each step sees, as a function of seed and step alone."""

from collections import Counter
from math import comb

import numpy as np
import pytest
from scipy.stats import chisquare

from llmkit.core.convert import check_fields
from llmkit.core.errors import RecipeError
from llmkit.data.node import Data, NoPacking, Sampler
from llmkit.data.order import Order
from llmkit.data.orders import Balanced, Bucketed, ByTokens, padding

CLASSES = np.array([0] * 180 + [1] * 15 + [2] * 5)


def walked(order, steps, first=0):
    return [order.step(i) for i in range(first, first + steps)]


@pytest.mark.parametrize("per_step", [1, 7, 16])
def test_classes_come_equally_often_and_rows_of_a_class_too(per_step):
    order = Balanced(3, CLASSES, per_step)
    assert order.steps_per_epoch == -(-200 // per_step)
    made = walked(order, 3 * order.steps_per_epoch)
    assert [epoch for epoch, _ in made] == [e for e in range(3) for _ in range(order.steps_per_epoch)]
    ids = [i for _, step in made for i in step]
    assert len(ids) == 600  # an epoch is as long as the rows are many
    counts = Counter(int(CLASSES[i]) for i in ids)
    assert chisquare([counts[c] for c in range(3)]).pvalue > 0.99
    plain = Counter(int(CLASSES[i]) for _, step in walked(Order(3, 200, per_step), 20) for i in step)
    assert per_step == 1 or chisquare([plain[c] for c in range(3)]).pvalue < 1e-6  # the control
    for members in (range(195, 200), range(180, 195), range(180)):
        times = [Counter(ids)[i] for i in members]
        assert max(times) - min(times) <= 1
    assert all(len(set(CLASSES[list(step)])) == 3 for _, step in made if len(step) >= 5)


def test_a_step_is_the_same_whoever_asks_and_whenever():
    for make in (lambda seed: Balanced(seed, CLASSES, 6), lambda seed: Bucketed(seed, np.arange(1, 201), 6, 5)):
        whole, later = walked(make(1), 100), walked(make(1), 40, 60)
        assert later == whole[60:] and whole != walked(make(2), 100)
        assert make(1).step(77) == whole[77]
    epochs = [[i for _, step in walked(Bucketed(0, CLASSES, 8, 4), 25, 25 * e) for i in step] for e in (0, 1)]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("rows,per_step,buckets", [(203, 8, 4), (200, 8, 25), (7, 3, 2), (5, 8, 3), (64, 1, 64)])
def test_buckets_see_every_row_once_an_epoch(rows, per_step, buckets):
    lengths = np.random.default_rng(0).integers(1, 90, rows)
    order = Bucketed(5, lengths, per_step, buckets)
    for epoch in range(2):
        made = walked(order, order.steps_per_epoch, epoch * order.steps_per_epoch)
        assert sorted(i for _, step in made for i in step) == list(range(rows))
        assert {e for e, _ in made} == {epoch}
        assert sum(len(step) < per_step for _, step in made) == (rows % per_step > 0)


def test_padding_is_what_the_closed_form_says():
    n, size = 240, 8
    lengths = np.arange(1, n + 1)
    finest = Bucketed(0, lengths, size, n // size)  # one bucket a step: each is a run of neighbours
    assert padding(finest, lengths, n // size) == pytest.approx((size - 1) / (n + size))
    lengths = np.random.default_rng(1).gamma(2.0, 60.0, n).astype(int) + 1
    order, epochs = Bucketed(0, lengths, size, 5), 200
    cells = sum(size * _mean_largest(np.sort(lengths[rows]), size) * len(rows) / size for rows in order.by_length)
    made = padding(order, lengths, epochs * order.steps_per_epoch)
    assert made == pytest.approx(1 - lengths.sum() / cells, rel=0.02)
    assert made < 0.5 * padding(Order(0, n, size), lengths, epochs * order.steps_per_epoch)


def _mean_largest(ordered, size):
    """The mean largest of `size` values drawn without replacement."""
    n = len(ordered)
    return sum(x * comb(j, size - 1) for j, x in enumerate(ordered)) / comb(n, size)


def test_what_contradicts_the_layout_is_refused():
    for more, other in (({}, "packing"), ({"packing": NoPacking(), "sampler": Sampler(balance="label")}, "sampler")):
        with pytest.raises(RecipeError, match=other):
            check_fields(Data(train=(), length_buckets=4, **more))


@pytest.mark.parametrize("tokens", [64, 500, 10**6])
def test_steps_of_tokens_hold_each_row_once_and_about_so_many(tokens):
    lengths = np.random.default_rng(0).integers(1, 64, 997)
    order = ByTokens(3, lengths, tokens)
    for epoch in (0, 1):
        steps = [order.step(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
        assert {which for which, _ in steps} == {epoch}
        assert sorted(i for _, ids in steps for i in ids) == list(range(997))
        sizes = [int(lengths[list(ids)].sum()) for _, ids in steps]
        mean = lengths.sum() / order.steps_per_epoch
        assert min(sizes) > 0 and max(abs(size - mean) for size in sizes) <= 64 and mean < max(2 * tokens, 64)
    assert order.step(0)[1] != order.step(order.steps_per_epoch)[1] or order.steps_per_epoch == 1


def test_no_step_of_tokens_is_empty_where_one_row_is_as_long_as_a_step():
    order = ByTokens(0, np.array([100, 1, 1, 100, 100, 1, 100]), 100)
    assert all(order.step(i)[1] for i in range(3 * order.steps_per_epoch))
