"""Blocks of cached keys and values."""

from __future__ import annotations

import pytest
import torch

from llmkit.core.types import Span
from llmkit.models.paged import BlockStore


def test_what_is_put_comes_back_in_order_through_scattered_blocks() -> None:
    store, keys, values = BlockStore(6, 4), torch.randn(2, 10, 3), torch.randn(2, 10, 5)
    for start, end in ((0, 3), (3, 9), (9, 10)):
        span = Span(0, 0, end - start, start, (4, 0, 5))
        all_keys, all_values = store.put(1, span, keys[:, start:end], values[:, start:end])
        assert torch.equal(all_keys, keys[:, :end])
        assert torch.equal(all_values, values[:, :end])
    assert store.layers[1][0].shape == (6, 4, 2, 3)
    assert store.layers[1][1].shape == (6, 4, 2, 5)
    assert not store.layers[1][0][[1, 2, 3]].any()  # blocks of others are untouched


def test_sequences_share_the_blocks_of_their_prefix() -> None:
    store, keys = BlockStore(4, 4), torch.randn(1, 4, 2)
    store.put(0, Span(0, 0, 4, 0, (2,)), keys, keys)
    own = torch.randn(1, 1, 2)
    both = [store.put(0, Span(0, 0, 1, 4, (2, block)), own * block, own)[0] for block in (0, 3)]
    assert torch.equal(both[0][:, :4], both[1][:, :4])
    assert torch.equal(both[1][:, 4:], own * 3)


def test_too_few_or_unknown_blocks_are_refused() -> None:
    store, keys = BlockStore(4, 4), torch.randn(1, 5, 2)
    with pytest.raises(ValueError, match="5 tokens need 2 blocks; the span has 1"):
        store.put(0, Span(0, 0, 5, 0, (2,)), keys, keys)
    with pytest.raises(ValueError, match="block 4 does not exist"):
        store.put(0, Span(0, 0, 5, 0, (2, 4)), keys, keys)
