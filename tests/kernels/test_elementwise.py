"""The compiled gate and norm against their plain twins: values and gradients on odd shapes."""

import pytest
import torch
from llmkit_kernels.build import lacks
from llmkit_kernels.gated import reference as plain_gate
from llmkit_kernels.gated import silu_mul
from llmkit_kernels.norm import reference as plain_norm
from llmkit_kernels.norm import rms_norm


def close(a, b, tol=2e-6):
    assert a.shape == b.shape
    if b.numel():
        assert (a - b).abs().max() <= tol * b.abs().max() + 1e-12


def compared(ours, theirs, *given):
    """A function's values and gradients against its twin's in fp64."""
    wide = [x.detach().double().requires_grad_() for x in given]
    out, want = ours(*given), theirs(*wide)
    close(out, want)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((out * weight).sum(), given)
    for a, b in zip(mine, torch.autograd.grad((want * weight).sum(), wide), strict=True):
        close(a, b)


def leaf(*shape, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * scale).requires_grad_()


@pytest.mark.skipif(bool(lacks("gated")), reason=lacks("gated"))
@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (3, 17), (2, 5, 48), (0, 4)], ids=str)
def test_gates_of_any_shape(shape):
    compared(silu_mul, plain_gate.silu_mul, leaf(*shape, scale=3.0), leaf(*shape).detach().flip(0).requires_grad_())


def test_gates_that_lie_apart_in_memory():
    gate, up = leaf(6, 20), leaf(20, 6)
    compared(lambda g, u: silu_mul(g, u.T), lambda g, u: plain_gate.silu_mul(g, u.T), gate, up)


def test_gates_far_from_zero():
    gate = torch.tensor([-1e4, -200.0, -90.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e4] * 4).requires_grad_()
    compared(silu_mul, plain_gate.silu_mul, gate, torch.ones(40, requires_grad=True))
    assert silu_mul(torch.full((16,), torch.nan), torch.ones(16)).isnan().all()


@pytest.mark.parametrize("rows,size", [(1, 16), (7, 48), (33, 576), (5, 24), (0, 32), (2, 7)])
def test_norms_of_any_shape(rows, size):
    x, weight = leaf(rows, size), leaf(size)
    compared(lambda a, b: rms_norm(a, b, 1e-6), lambda a, b: plain_norm.rms_norm(a, b, 1e-6), x, weight)


def test_norms_in_three_dimensions_strided_or_with_a_frozen_weight():
    x, weight = leaf(4, 3, 32), leaf(32)
    compared(
        lambda a, b: rms_norm(a.transpose(0, 1), b, 1e-5),
        lambda a, b: plain_norm.rms_norm(a.transpose(0, 1), b, 1e-5),
        x,
        weight,
    )
    frozen = weight.detach()
    compared(lambda a: rms_norm(a, frozen, 1e-5), lambda a: plain_norm.rms_norm(a, frozen.double(), 1e-5), x)


def test_a_row_of_zeros_has_a_finite_norm_and_gradient():
    x = torch.zeros(2, 16, requires_grad=True)
    out = rms_norm(x, torch.ones(16), 1e-6)
    assert not out.detach().any() and torch.autograd.grad(out.sum(), x)[0].isfinite().all()
