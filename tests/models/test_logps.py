"""The chunked head against dense logits: values, gradients, cost and memory."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llmkit.core import matmul
from llmkit.models.logits import Shape
from llmkit.models.logps import chosen_logps, plain_logps

SHAPES = [Shape(), Shape(scale=0.3), Shape(cap=5.0), Shape(scale=2.0, cap=3.0)]


def make(n=37, hidden=24, vocab=101, bias=False, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, hidden, generator=g, dtype=dtype).requires_grad_()
    w = torch.randn(vocab, hidden, generator=g, dtype=dtype).requires_grad_()
    b = torch.randn(vocab, generator=g, dtype=dtype).requires_grad_() if bias else None
    y = torch.randint(vocab, (n,), generator=g)
    return h, w, b, y, torch.rand(n, generator=g, dtype=dtype) + 0.1


def close(a, b, tol=1e-6):
    assert (a - b).abs().max() <= tol * b.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [(1, 101), (7, 16), (64, 1), (64, 200)])
@pytest.mark.parametrize("hint", ["none", "right", "wrong"])
def test_values_and_gradients_equal_the_dense_twin(shape, bias, block, hint):
    h, w, b, y, weights = make(bias=bias, dtype=torch.float32)
    given = {"none": None, "right": weights * 3, "wrong": torch.ones_like(weights)}[hint]
    got = chosen_logps(h, w, b, y, given, shape, block)
    leaves = [t for t in (h, w, b) if t is not None]
    ours = torch.autograd.grad(-(got * weights).sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]  # in fp32 the twin itself is off by 1e-6
    want = plain_logps(wide[0], wide[1], wide[2] if bias else None, y, shape)
    theirs = torch.autograd.grad(-(want * weights).sum(), wide)
    close(got, want)
    for a, c in zip(ours, theirs, strict=True):
        close(a, c)
    frozen = chosen_logps(h, w.detach(), None if b is None else b.detach(), y, given, shape, block)
    close(frozen, want)
    close(torch.autograd.grad(-(frozen * weights).sum(), [h])[0], theirs[0])


def test_logits_of_any_size_stay_finite_and_what_is_not_a_number_is_not_hidden():
    h, w, b, y, _ = make(bias=True, dtype=torch.float32)
    h, w, b = h.detach() * 1e4, w.detach(), torch.full_like(b, -torch.inf)
    b[50:] = 0  # the first blocks have no word that can be
    got = chosen_logps(h, w, b, y, block=(8, 16))
    torch.testing.assert_close(got, plain_logps(h, w, b, y, Shape()), rtol=1e-6, atol=1e-6)
    h[3] = torch.nan
    assert chosen_logps(h, w, b, y, block=(8, 16)).isnan().tolist() == [i == 3 for i in range(len(y))]


def test_a_frozen_head_gets_no_gradient_and_a_frozen_hidden_none():
    h, w, _, y, weights = make(dtype=torch.float32)
    out = chosen_logps(h, w.detach(), None, y, weights)
    assert torch.autograd.grad(out.sum(), [h])[0].shape == h.shape
    out = chosen_logps(h.detach(), w, None, y, weights)
    close(
        *[torch.autograd.grad((o * weights).sum(), [w])[0] for o in (out, plain_logps(h.detach(), w, None, y, Shape()))]
    )


@pytest.mark.parametrize("hinted", [False, True])
def test_no_chosen_position_is_a_sum_of_nothing(hinted):
    h, w, _, y, weights = make(n=0, dtype=torch.float32)
    out = chosen_logps(h, w, None, y, weights if hinted else None)
    grads = torch.autograd.grad(out.sum(), [h, w])
    assert out.shape == (0,) and all(float(g.abs().sum()) == 0 for g in grads)


@pytest.mark.parametrize("trained", [False, True])
def test_at_80_percent_masked_the_head_costs_a_quarter_at_most(trained, monkeypatch):
    monkeypatch.setattr(matmul, "_onednn", lambda: None)  # the counter knows torch's own products only
    hidden = torch.randn(100, 32, requires_grad=True)
    weight = torch.randn(512, 32, requires_grad=trained)
    labels, chosen = torch.randint(512, (100,)), torch.arange(100) % 5 == 0
    with FlopCounterMode(display=False) as dense:
        (plain_logps(hidden, weight, None, labels, Shape()) * chosen).sum().backward()
    with FlopCounterMode(display=False) as ours:
        chosen_logps(hidden[chosen], weight, None, labels[chosen], torch.ones(20), block=(8, 64)).sum().backward()
    assert 0 < ours.get_total_flops() <= 0.25 * dense.get_total_flops()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.numel())
        return out


def test_memory_grows_with_the_chunk_not_with_vocabulary_times_positions():
    n, vocab, hidden, block = 512, 1000, 8, (64, 100)
    h, w, _, y, weights = make(n, hidden, vocab, dtype=torch.float32)
    with Largest() as seen:
        chosen_logps(h, w, None, y, weights, block=(16, 1)).sum().backward()
    assert seen.size == 16 * vocab
    w = w.detach()
    with Largest() as seen:
        chosen_logps(h, w, None, y, weights, block=block).sum().backward()
    assert seen.size == 64 * 100
    with Largest() as control:
        plain_logps(h, w, None, y, Shape()).sum().backward()
    assert control.size == n * vocab


def test_bf16_stays_near_fp32():
    h, w, _, y, weights = make(dtype=torch.float32)
    out = chosen_logps(h.bfloat16(), w.bfloat16(), None, y, weights, block=(8, 64))
    assert out.dtype == torch.float32
    assert (out - plain_logps(h, w, None, y, Shape())).abs().max() < 0.3


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_takes_a_head_with_a_bias(trained):
    h, w, b, y, weights = make(bias=True, dtype=torch.float32)
    w, b = w.detach().requires_grad_(trained), b.detach().requires_grad_(trained)
    with torch.autocast("cpu", torch.bfloat16):
        out = chosen_logps(h, w, b, y, weights)
    grads = torch.autograd.grad((out * weights).sum(), [h, w, b] if trained else [h])
    assert (out - plain_logps(h, w, b, y, Shape())).abs().max() < 0.3
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_tied_weights_add_both_gradients():
    emb = nn.Embedding(50, 8)
    ids, y = torch.arange(20), torch.arange(20) + 1

    def run(fn):
        return torch.autograd.grad(fn(emb(ids) * 1.5, emb.weight), [emb.weight])[0]

    ones = torch.ones(20)
    close(
        run(lambda h, w: chosen_logps(h, w, None, y, ones).sum()),
        run(lambda h, w: plain_logps(h, w, None, y, Shape()).sum()),
        2e-6,
    )
