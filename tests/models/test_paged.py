"""Blocks of cached keys and values."""

from __future__ import annotations

import pytest
import torch
from llmkit_kernels.paged.laid import Held
from torch import Tensor

from llmkit.core.types import Paged, Segment, Span, Tree
from llmkit.models.attend import decoded, install
from llmkit.models.families import tiny
from llmkit.models.paged import BlockStore
from llmkit.models.pieces import Piece, Rule, eager


def put(store: BlockStore, layer: int, span: Span, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Stores the new tokens of a span; gives all of its sequence."""
    laid = store.lay([span])
    store.write(layer, keys, values, laid)
    return store.read(layer, laid, 0, keys)


def test_what_is_put_comes_back_in_order_through_scattered_blocks() -> None:
    store, keys, values = BlockStore(6, 4), torch.randn(2, 10, 3), torch.randn(2, 10, 5)
    store.held(1, keys, values).keys.zero_()
    for start, end in ((0, 3), (3, 9), (9, 10)):
        span = Span(0, 0, end - start, start, (4, 0, 5))
        all_keys, all_values = put(store, 1, span, keys[:, start:end], values[:, start:end])
        assert torch.equal(all_keys, keys[:, :end])
        assert torch.equal(all_values, values[:, :end])
    assert not store.layers[1].keys[[1, 2, 3]].any()  # blocks of others are untouched


def test_sequences_share_the_blocks_of_their_prefix() -> None:
    store, keys = BlockStore(4, 4), torch.randn(1, 4, 2)
    put(store, 0, Span(0, 0, 4, 0, (2,)), keys, keys)
    own = torch.randn(1, 1, 2)
    both = [put(store, 0, Span(0, 0, 1, 4, (2, block)), own * block, own)[0] for block in (0, 3)]
    assert torch.equal(both[0][:, :4], both[1][:, :4])
    assert torch.equal(both[1][:, 4:], own * 3)


def test_int8_is_as_near_as_a_factor_for_each_head_of_a_token_allows() -> None:
    store, keys, values = BlockStore(2, 16, torch.int8), torch.randn(2, 10, 8), torch.randn(2, 10, 5)
    values[1, 3] = 0
    values[0, 4, 2] = torch.inf
    back = put(store, 0, Span(0, 0, 10, 0, (1,)), keys, values)
    steps = [x.abs().amax(-1, keepdim=True) / 254 * 1.001 for x in (keys, values)]
    assert ((back[0] - keys).abs() <= steps[0]).all()
    assert back[1][0, 4].isnan().all()
    assert not back[1][1, 3].any()
    values[0, 4], steps[1][0, 4] = back[1][0, 4], 1
    assert ((back[1] - values).abs() <= steps[1]).logical_or(values.isnan()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_an_accepted_path_comes_to_lie_end_to_end(dtype: torch.dtype) -> None:
    store, keys, values = BlockStore(3, 4, dtype), torch.randn(2, 10, 3), torch.randn(2, 10, 5)
    blocks = (2, 0, 1)
    before = put(store, 0, Span(0, 0, 10, 0, blocks), keys, values)
    slot = [blocks[at // 4] * 4 + at % 4 for at in range(10)]
    store.move([slot[at] for at in (5, 7, 9)], slot[4:7])  # 5 is read and written
    laid = store.lay([Span(0, 0, 1, 6, blocks)])
    for there, held in zip(before, store.read(0, laid, 0, keys), strict=True):
        assert torch.equal(held, there[:, [0, 1, 2, 3, 5, 7, 9]])


def test_layers_that_share_keys_share_blocks_and_none_comes_after_the_store_is_sized() -> None:
    store, keys, values, other = BlockStore(1, 4), torch.randn(1, 1, 2), torch.randn(1, 1, 2), torch.randn(1, 1, 2)
    laid = store.lay([Span(0, 0, 1, 0, (0,))])
    for layer, own in enumerate((keys, other, keys)):
        store.write(layer, own, values, laid)
    assert store.same == {2: 0}
    assert torch.equal(store.read(2, laid, 0, keys)[0], keys)
    one = sum(store.bytes.values())
    store.resize(7)
    assert sum(store.bytes.values()) == 7 * one
    with pytest.raises(ValueError, match="layer 3 had no keys when the cache was sized"):
        store.write(3, keys, values, laid)


def test_too_few_or_unknown_blocks_are_refused() -> None:
    store = BlockStore(4, 4)
    with pytest.raises(ValueError, match="5 tokens need 2 blocks; the span has 1"):
        store.lay([Span(0, 0, 5, 0, (2,))])
    with pytest.raises(ValueError, match="block 4 does not exist"):
        store.lay([Span(0, 0, 5, 0, (2, 4))])
    with pytest.raises(ValueError, match=r"span \[0, 2\) is empty, out of order"):
        store.lay([Span(0, 2, 4, 0, (2,)), Span(0, 0, 2, 0, (3,))])


def test_a_block_that_several_hold_is_copied_before_it_is_written() -> None:
    store, keys = BlockStore(4, 4), torch.randn(1, 2, 2)
    put(store, 0, Span(0, 0, 2, 0, (1,)), keys, keys)
    store.copy(1, 3)
    for held in (store.layers[0].keys, store.layers[0].values):  # what was never written may be no number
        assert torch.allclose(held[3], held[1], rtol=0, atol=0, equal_nan=True)
    assert store.layers[0].keys[3].any()


@pytest.mark.parametrize("family", ["Llama", "Gemma-3", "Gemma-2", "gpt-oss"])
@pytest.mark.parametrize("kind", ["auto", "eager"])
def test_a_tree_of_drafts_is_what_the_trainer_s_tree_is(family: str, kind: str) -> None:
    """A past of 5, then drafts: two branches on the past, one of which has two on its first token."""
    model, tokens = tiny(family).eval(), torch.randint(3, 60, (12,), generator=torch.Generator().manual_seed(1))
    install(model, kind)
    parents = (-1, 0, 0, 1, -1, 4, 2)
    depths = [0, 1, 1, 2, 0, 1, 2]
    places = torch.tensor([*range(5), *(5 + depth for depth in depths)])
    store, blocks = BlockStore(6, 4), (3, 0, 5)
    contexts = [Paged(store, (Span(0, 0, 5, 0, blocks),)), Paged(store, (Span(0, 0, 7, 5, blocks, parents),))]
    # the same as branches of one row: each draft a segment of one token after its parent's
    segments = (Segment(0, 0, 5), *(Segment(0, 5 + at, 6 + at, parent + 1) for at, parent in enumerate(parents)))
    with torch.no_grad():
        parts = [
            model(input_ids=tokens[None, at], position_ids=places[None, at], attend=context).logits[0]
            for at, context in zip((slice(0, 5), slice(5, 12)), contexts, strict=True)
        ]
        whole = model(input_ids=tokens[None], position_ids=places[None], attend=Tree(segments)).logits[0]
    assert (torch.cat(parts) - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("rule", [Rule(0.3), Rule(0.3, window=3), Rule(0.3, cap=2.0), Rule(0.3, sinks=torch.ones(4))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_a_step_of_single_tokens_in_one_call_is_each_by_itself(rule: Rule, dtype: torch.dtype) -> None:
    store, blocks = BlockStore(9, 4, dtype), ((8, 1, 5), (2,), (0, 7))
    pasts = (10, 0, 4)
    g = torch.Generator().manual_seed(0)
    store.layers[0] = Held.made(9, 4, (2, 8, 6), dtype, torch.device("cpu"))
    for tensor in store.layers[0].tensors:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 0)  # what nobody wrote
    for past, own in zip(pasts, blocks, strict=True):
        if past:
            keys, values = (torch.randn(2, past, n, generator=g).double() for n in (8, 6))
            store.write(0, keys, values, store.lay([Span(0, 0, past, 0, own)]))
    q, k, v = (torch.randn(1, h, 3, n, generator=g).double() for h, n in ((4, 8), (2, 8), (2, 6)))
    spans = tuple(Span(0, at, at + 1, past, own) for at, (past, own) in enumerate(zip(pasts, blocks, strict=True)))
    context = Paged(store, spans)
    out = decoded(0, q, k, v, context, rule)
    for at in range(3):
        keys, values = store.read(0, context.laid, at, q)
        want = eager([Piece(q[:, :, at : at + 1], keys[None], values[None], pasts[at])], rule)[0]
        torch.testing.assert_close(out[:, at], want[:, :, 0])
