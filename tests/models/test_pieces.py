"""Every kind of attention over pieces equals the plain twin, values and gradients, on odd shapes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softmax

from llmkit.models.pieces import Kind, Piece, Rule, eager, fused, scored, sdpa

SHAPES = [(0, 1), (0, 7), (9, 1), (0, 129), (130, 5), (3, 300)]
"""(before, queries): one query, one more than a block of queries, long prefixes."""

RULES = {
    "plain": {},
    "window": {"window": 5},
    "cap": {"cap": 2.0},
    "window and cap": {"window": 140, "cap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
}


def pieces(
    heads: int = 4, shared: int = 2, size: int = 8, value: int = 8, dtype: torch.dtype = torch.float64
) -> list[Piece]:
    made, draw = [], torch.Generator().manual_seed(0)
    for before, length in SHAPES:
        sizes = ((heads, length, size), (shared, before + length, size), (shared, before + length, value))
        q, k, v = (torch.randn(1, *s, generator=draw, dtype=dtype).requires_grad_() for s in sizes)
        made.append(Piece(q, k, v, before))
    return made


def with_gradients(kind: Kind, given: Sequence[Piece], rule: Rule) -> list[Tensor]:
    outs = kind(given, rule)
    loss = sum((out * torch.arange(out.numel()).view_as(out).cos()).sum() for out in outs)
    return [*outs, *torch.autograd.grad(loss, [t for p in given for t in (p.q, p.k, p.v)])]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("shared", "value"), [(2, 8), (4, 4), (1, 12)])
def test_sdpa_equals_its_plain_twin(rule: str, shared: int, value: int) -> None:
    how = Rule(0.3, **RULES[rule])
    given = pieces(shared=shared, value=value)
    for ours, plain in zip(with_gradients(sdpa, given, how), with_gradients(eager, given, how), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-12)


def test_the_plain_twin_is_the_formula() -> None:
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(3))
    sinks = torch.tensor([0.3, -0.2], dtype=torch.float64)
    (out,) = eager([Piece(q, k, v, 0)], Rule(0.5, window=2, cap=3.0, sinks=sinks))
    for head in range(2):
        for i in range(3):
            seen = range(max(0, i - 1), i + 1)
            scores = torch.stack([3 * torch.tanh(0.5 * (q[0, head, i] @ k[0, head, j]) / 3) for j in seen])
            weights = softmax(torch.cat([scores, sinks[head : head + 1]]), 0)[:-1]
            assert torch.allclose(out[0, head, i], sum(w * v[0, head, j] for w, j in zip(weights, seen, strict=True)))


def test_a_query_that_sees_no_key_stays_finite() -> None:
    q, k, v = (torch.randn(1, 1, 2, 4) for _ in range(3))
    mask = torch.tensor([[False, False], [True, True]])
    assert torch.isfinite(scored(q, k, v, mask, Rule(1.0, cap=1.0))).all()


@pytest.mark.parametrize("size", [4, 8, 12])
def test_values_of_another_size_change_nothing(size: int) -> None:
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, size)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    plain = scored(q, k, v, mask, Rule(0.4))
    assert torch.allclose(fused(q, k, v, Rule(0.4), causal=True), plain, rtol=1e-5, atol=1e-6)


def test_dropout_drops_and_keeps_the_mean() -> None:
    q, k, v = torch.zeros(1, 1, 400, 4), torch.zeros(1, 1, 400, 4), torch.ones(1, 1, 400, 4)
    for kind in (sdpa, eager):
        torch.manual_seed(0)
        (out,) = kind([Piece(q, k, v, 0)], Rule(1.0, dropout=0.5))
        assert out.std() > 0.01
        assert abs(out.mean() - 1) < 0.05
        assert torch.equal(kind([Piece(q, k, v, 0)], Rule(1.0))[0].round(decimals=4), v)
