"""Order, packing and batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.batches import micro_batches
from llmkit.data.node import FirstFit, NoPacking
from llmkit.data.order import Order, permutation
from llmkit.data.prepare import Prepared


def prepared(lengths, seed=0):
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(1, 99, starts[-1]).astype(np.int32)
    return Prepared(ids, rng.integers(0, 2, starts[-1]).astype(np.float32), starts, ())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 9))
def test_every_row_once_an_epoch_whatever_was_asked_before(rows, per_step, seed):
    order = Order(seed, rows, per_step)
    steps = order.steps_per_epoch
    first = [order.step(i) for i in range(2 * steps)]
    assert [order.step(i) for i in reversed(range(2 * steps))] == first[::-1]
    for epoch in range(2):
        ids = [i for e, step in first for i in step if e == epoch]
        assert sorted(ids) == list(range(rows))
    assert all(len(step) == per_step for _, step in first[: steps - 1])


def test_the_order_is_pinned():
    assert permutation(0, 0, 8).tolist() == PINNED
    assert permutation(0, 1, 8).tolist() != PINNED != permutation(1, 0, 8).tolist()


PINNED = [5, 0, 1, 4, 2, 3, 7, 6]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 64))
def test_first_fit_holds_each_once_in_order_and_within_capacity(lengths, capacity):
    rows = FirstFit().pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity and row == sorted(row) for row in rows)
    for number, row in enumerate(rows[1:], 1):  # the first of a row had no room in any row before it
        before = [sum(lengths[i] for i in rows[k] if i < row[0]) for k in range(number)]
        assert all(used + lengths[row[0]] > capacity for used in before)


def content(batches):
    """The multiset of (token, position, label, weight) of all tokens that are in a segment."""
    found = []
    for batch in batches:
        inside = np.zeros(batch.tokens.shape, dtype=bool)
        for row, length in enumerate(batch.lengths):
            inside[row, :length] = True
        if not batch.lengths:
            inside[:] = True
        found += list(
            zip(
                *(t.numpy()[inside].tolist() for t in (batch.tokens, batch.positions, batch.labels, batch.weights)),
                strict=True,
            )
        )
    return sorted(found)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_packed_and_padded_carry_the_same(rows):
    made = prepared([5, 1, 9, 3, 7, 2])
    ids = (4, 0, 2, 1)
    packed = micro_batches(made, ids, FirstFit(), 12, rows, True, "cpu")
    padded = micro_batches(made, ids, NoPacking(), 12, rows, False, "cpu")
    assert content(packed) == content(padded)
    assert all(batch.tokens.shape[0] == 1 for batch in packed)
    assert sum(batch.tokens.numel() for batch in packed) == 7 + 5 + 9 + 1
    assert [i for batch in padded for i in batch.ids] == list(ids)


def test_labels_are_the_next_token_and_the_last_has_no_weight():
    made = prepared([4])
    (batch,) = micro_batches(made, (0,), FirstFit(), 8, 1, True, "cpu")
    ids, weights = made.example(0)
    assert batch.labels[0, :3].tolist() == ids[1:].tolist() and batch.weights[0].tolist() == [*weights[1:], 0.0]


@pytest.mark.parametrize("packing", [FirstFit(), NoPacking()])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_ranks_together_have_the_step_once_and_equally_many_micro_batches(packing, world):
    data = prepared([5, 9, 3, 7, 12, 4, 8], seed=2)
    whole = micro_batches(data, range(7), packing, 16, 2, True, "cpu")
    dealt = [micro_batches(data, range(7), packing, 16, 2, True, "cpu", rank, world) for rank in range(world)]
    assert len({len(batches) for batches in dealt}) == 1
    real = [batch for batches in dealt for batch in batches if batch.weights.any()]
    assert sorted(batch.ids for batch in real) == sorted(batch.ids for batch in whole)
