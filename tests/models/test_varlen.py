"""flash and flex lay pieces end to end; here with a plain function in flash-attn's place, and flex uncompiled."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from llmkit.core.errors import ModelError
from llmkit.core.types import Packed, Paged, Segment, Span
from llmkit.models.paged import BlockStore
from llmkit.models.pieces import Piece, Rule, eager
from llmkit.models.varlen import blocked, own_varlen, packed, packed_blocks, paged, row_lengths, tiled

SHAPES = [(0, 1), (0, 7), (9, 1), (0, 129), (130, 5), (3, 100)]


def pieces() -> list[Piece]:
    draw = torch.Generator().manual_seed(0)
    sizes = [(before, length, before + length) for before, length in SHAPES]
    return [
        Piece(*(torch.randn(1, *s, 16, generator=draw) for s in ((4, length), (2, keys), (2, keys))), before)
        for before, length, keys in sizes
    ]


def plain_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    q_most: int,
    k_most: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """What flash-attn's varlen function is documented to do: causal, aligned to the last key of each sequence."""
    assert causal and q_starts.dtype == k_starts.dtype == torch.int32
    assert (q_most, k_most) == (max(n for _, n in SHAPES), max(b + n for b, n in SHAPES))
    outs = []
    for n in range(len(q_starts) - 1):
        here, there = slice(q_starts[n], q_starts[n + 1]), slice(k_starts[n], k_starts[n + 1])
        one = [t[None].transpose(1, 2) for t in (q[here], k[there], v[there])]
        piece = Piece(*one, one[1].shape[2] - one[0].shape[2])
        outs.append(eager([piece], Rule(softmax_scale, window_size[0] + 1, softcap))[0].transpose(1, 2)[0])
    return torch.cat(outs)


@pytest.mark.parametrize("rule", [Rule(0.2), Rule(0.2, window=5), Rule(0.2, cap=1.5)])
def test_flash_lays_pieces_end_to_end(rule: Rule) -> None:
    given = pieces()
    for ours, plain in zip(tiled(given, rule, plain_varlen), eager(given, rule), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("rule", [Rule(0.2), Rule(0.2, window=5)])
def test_torch_s_own_flash_is_asked_for_the_same(rule: Rule, shares: bool) -> None:
    def attn(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float, window_size: Any, **more: Any) -> Tensor:
        assert q.shape[2] == 16 and more == ({"enable_gqa": True} if shares else {})
        assert shares or k.shape[1] == q.shape[1]
        assert window_size == ((rule.window - 1, 0) if rule.window else (-1, 0))
        return plain_varlen(q, k, v, *rest, 0.0, scale, True, window_size if rule.window else (-1, -1), 0.0)

    odd = [Piece(*(t[..., :12] for t in (p.q, p.k, p.v)), p.before) for p in pieces()]  # no multiple of 8
    ours = tiled(odd, rule, partial(own_varlen, attn, shares))
    for out, plain in zip(ours, eager(odd, rule), strict=True):
        assert torch.allclose(out, plain, rtol=1e-5, atol=1e-6)
    for wrong in (Rule(0.2, cap=1.5), Rule(0.2, dropout=0.1)):
        with pytest.raises(ModelError, match="neither dropout nor soft-caps"):
            tiled(odd, wrong, partial(own_varlen, attn, shares))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_step_over_blocks_is_one_call(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    store = BlockStore(200, 4, dtype)
    spans, at, taken = [], 0, 0
    for before, length in SHAPES:
        need = -(-(before + length) // 4)
        used = tuple((taken + n) * 7 % 200 for n in range(need))
        if before:
            keys, values = torch.randn(2, 2, before, 16, generator=draw)
            store.write(0, keys, values, store.lay([Span(0, 0, before, 0, used)]))
        spans.append(Span(0, at, at + length, before, used))
        at, taken = at + length, taken + need
    q, k, v = (torch.randn(1, heads, at, 16, generator=draw) for heads in (4, 2, 2))
    context = Paged(store, tuple(spans))
    out = paged(0, q, k, v, context, Rule(0.2), plain_varlen)
    for index, span in enumerate(spans):
        keys, values = store.read(0, context.laid, index, q)
        want = eager([Piece(q[:, :, span.start : span.end], keys[None], values[None], span.past)], Rule(0.2))[0]
        assert torch.allclose(out[:, span.start : span.end].transpose(1, 2), want, rtol=1e-5, atol=1e-6)


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", [Rule(0.2), Rule(0.2, window=5), Rule(0.2, cap=1.5), Rule(0.2, sinks=SINKS)])
def test_flex_equals_the_plain_twin(rule: Rule) -> None:
    given = pieces()
    for ours, plain in zip(blocked(given, rule, flex_attention), eager(given, rule), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-5, atol=2e-6)


def test_flex_visits_only_blocks_that_share_a_piece() -> None:
    seen: list[Any] = []

    def watching(q: Tensor, k: Tensor, v: Tensor, score: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        seen.append(mask)
        return torch.zeros_like(q), torch.zeros(q.shape[:3])

    same = [torch.randn(1, 1, 128, 16) for _ in range(3)]
    blocked([Piece(*same, 0) for _ in range(8)], Rule(1.0), watching)
    assert seen[0].kv_num_blocks.tolist() == [[[1] * 8]]  # control: a dense mask has 8 for each
    assert seen[0].kv_indices[0, 0, :, 0].tolist() == list(range(8))


def test_flex_refuses_dropout() -> None:
    with pytest.raises(ModelError, match="flex knows no attention dropout"):
        blocked(pieces(), Rule(1.0, dropout=0.1), flex_attention)


LENGTHS = (1, 7, 129, 64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", [Rule(0.2), Rule(0.2, window=5)])
def test_a_whole_packed_row_needs_no_cutting(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call over the row: values and gradients are those of its segments, cut out."""
    monkeypatch.setitem(globals(), "SHAPES", [(0, n) for n in LENGTHS])
    ends = list(accumulate(LENGTHS))
    places = list(zip([0, *ends], ends, strict=False))
    draw = torch.Generator().manual_seed(0)
    row = [torch.randn(1, heads, ends[-1], 16, generator=draw).requires_grad_() for heads in (4, 2, 2)]
    lengths = row_lengths(Packed(tuple(Segment(0, a, b) for a, b in places)), row[0].shape)
    assert lengths == LENGTHS
    cut = eager([Piece(*(t[:, :, a:b] for t in row), 0) for a, b in places], rule)
    want = torch.cat([out.transpose(1, 2) for out in cut], 1)
    got = packed(*row, lengths=lengths, rule=rule, func=plain_varlen)
    assert torch.allclose(got, want, rtol=1e-5, atol=2e-6)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), row, retain_graph=True) for x in (got, want)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    blocks = packed_blocks(*(t.detach() for t in row), lengths=lengths, rule=rule, func=flex_attention)
    assert torch.allclose(blocks, want, rtol=1e-5, atol=2e-6)


def test_a_row_with_gaps_parents_or_neighbours_is_cut() -> None:
    shape = (1, 4, 10, 16)
    for segments in (
        [Segment(0, 0, 4), Segment(0, 5, 10)],
        [Segment(0, 0, 9)],
        [Segment(0, 0, 4), Segment(0, 4, 10, 0)],
        [Segment(1, 0, 10)],
    ):
        assert row_lengths(Packed(tuple(segments)), shape) == ()
    assert row_lengths(Packed((Segment(0, 0, 10),)), (2, 4, 10, 16)) == ()
