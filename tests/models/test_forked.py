"""Rows of trees for attention that takes keys end to end; here with a plain function in flash-attn's place."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.core.types import Packed, Segment, Tree
from llmkit.models import varlen
from llmkit.models.attend import KINDS, attention
from llmkit.models.forked import brought, laid
from llmkit.models.pieces import Piece, Rule, eager

TREES = (
    Segment(0, 0, 9),
    Segment(0, 9, 12, 0),
    Segment(0, 12, 13, 0),
    Segment(0, 13, 20, 1),
    Segment(0, 20, 24),
    Segment(0, 24, 33),
    Segment(0, 33, 40, 5),
)
"""A prompt with two branches, of which one has one of its own; one without any; another prompt with one."""
TOKENS, CPU = 40, torch.device("cpu")


def row(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, TOKENS, 16, generator=draw).to(dtype).requires_grad_() for n in (4, 2, 2)]


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, *most: int, **how: Any) -> Tensor:
    """What flash-attn's varlen function is documented to do: causal, aligned to the last key of each sequence."""
    assert how["causal"] and most == tuple(int(at.diff().max()) for at in (q_starts, k_starts))
    rule, outs = Rule(how["softmax_scale"], how["window_size"][0] + 1, how["softcap"]), []
    for (a, b), (c, d) in zip(pairwise(q_starts.tolist()), pairwise(k_starts.tolist()), strict=True):
        one = [t[None].transpose(1, 2) for t in (q[a:b], k[c:d], v[c:d])]
        outs.append(eager([Piece(*one, d - c - (b - a))], rule)[0].transpose(1, 2)[0])
    return torch.cat(outs)


@pytest.mark.parametrize("rule", [Rule(0.2), Rule(0.2, window=5), Rule(0.2, cap=1.5)], ids=["causal", "window", "cap"])
def test_trees_in_one_call_are_their_paths(rule: Rule) -> None:
    """Values and gradients, of a prompt too that many see."""
    given = row()
    there = laid(TREES, given[0].shape, CPU)
    assert there is not None and there.keys == (9, 12, 10, 19, 4, 9, 16)
    how = {"scaling": rule.scale, "sliding_window": rule.window or None, "softcap": rule.cap or None}
    want = attention(KINDS["eager"])(None, *given, attend=Tree(TREES), **how)[0]
    got = varlen.branched(*given, laid=there, rule=rule, func=plain_varlen)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(x.sin().sum(), given, retain_graph=True) for x in (got, want)]
    for ours, plain in zip(*grads, strict=True):
        assert plain.abs().max() > 0 and torch.allclose(ours, plain, rtol=1e-10, atol=1e-12)


def test_gradients_of_what_many_see_are_added_in_fp32() -> None:
    """In 16 bits their sum is rounded once."""
    segments = (Segment(0, 0, 2), *(Segment(0, at, at + 1, 0) for at in range(2, 34)))
    there = laid(segments, (1, 1, 34, 1), CPU)
    assert there is not None
    rows = torch.zeros(34, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    by = torch.randn(len(there.of), 1, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    (grad,) = torch.autograd.grad(brought(rows, there), rows, by)
    want = torch.zeros(34, 1, 4, dtype=torch.float64).index_add(0, there.of, by.double())
    assert torch.equal(grad, want.to(torch.bfloat16))


def test_flash_takes_a_row_of_trees_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def seen(*given: Any, **how: Any) -> Tensor:
        calls.append(given[0].dtype)
        return plain_varlen(*given, **how)

    monkeypatch.setattr(varlen, "varlen_func", lambda: seen)
    monkeypatch.setattr(varlen, "tiled", None)  # which takes segments cut out
    given, run = row(torch.bfloat16), attention(KINDS["flash"])
    got = run(None, *given, scaling=0.2, attend=Tree(TREES))[0]
    want = attention(KINDS["eager"])(None, *given, scaling=0.2, attend=Tree(TREES))[0]
    assert calls == [torch.bfloat16] and torch.allclose(got, want, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        run(None, *row(torch.float32), scaling=0.2, attend=Tree(TREES))
    assert calls == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    "segments",
    [(Segment(0, 0, 4), Segment(0, 5, TOKENS)), TREES[:-1], (Segment(1, 0, TOKENS),), ()],
    ids=["a gap", "short", "another row", "none"],
)
def test_other_rows_are_cut(segments: tuple[Segment, ...]) -> None:
    assert laid(segments, (1, 4, TOKENS, 16), CPU) is None
    assert laid(TREES, (2, 4, TOKENS, 16), CPU) is None


def test_a_parent_comes_first() -> None:
    with pytest.raises(ValueError, match="not an earlier segment"):
        laid((Segment(0, 0, 4, 1), Segment(0, 4, TOKENS)), (1, 4, TOKENS, 16), CPU)


def test_segments_without_parents_are_packed_ones() -> None:
    given, plain = row(), tuple(Segment(0, at, at + 8) for at in range(0, TOKENS, 8))
    there = laid(plain, given[0].shape, CPU)
    assert there is not None and not len(there.seen)
    want = attention(KINDS["eager"])(None, *given, scaling=0.2, attend=Packed(plain))[0]
    assert torch.allclose(varlen.branched(*given, laid=there, rule=Rule(0.2), func=plain_varlen), want)
