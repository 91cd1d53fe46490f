"""Operations that have a compiled row on the CPU, and the head in blocks: on any device they are their plain twins."""

from __future__ import annotations

import copy

import pytest
import torch
from llmkit_kernels.gated import silu_mul
from llmkit_kernels.norm import reference, rms_norm
from torch import Tensor, nn

from llmkit.models.families import tiny
from llmkit.models.fused import fuse
from llmkit.models.logits import Shape
from llmkit.models.logps import chosen_logps, plain_logps
from llmkit.models.paged import quantised
from llmkit.parallel.offload import Offload, Pinned

FP32, BF16 = torch.float32, torch.bfloat16


def drawn(device: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=draw).to(device, dtype).requires_grad_() for shape in shapes]


def near(ours: Tensor, plain: Tensor, close: float) -> None:
    assert (ours.float() - plain.float()).norm() <= close * plain.float().norm()


@pytest.mark.parametrize(("dtype", "close"), [(FP32, 1e-5), (BF16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [48, 50])
def test_norms_and_gates_in_values_and_gradients(dtype: torch.dtype, close: float, size: int, device: str) -> None:
    x, weight, gate, up = drawn(device, dtype, (3, 7, size), (size,), (3, 7, size), (3, 7, size))
    wide = [t.detach().double().requires_grad_() for t in (x, weight, gate, up)]
    made = [rms_norm(x, weight, 1e-6), silu_mul(gate, up)]
    plain = [reference.rms_norm(wide[0], wide[1], 1e-6), nn.functional.silu(wide[2]) * wide[3]]
    ours = torch.autograd.grad([m.sin().sum() for m in made], [x, weight, gate, up])
    theirs = torch.autograd.grad([m.sin().sum() for m in plain], wide)
    for a, b in zip((*made, *ours), (*plain, *theirs), strict=True):
        near(a, b, close)


@pytest.mark.parametrize("shape", [Shape(), Shape(scale=0.5, cap=5.0)], ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_the_head_in_blocks(shape: Shape, trained: bool, device: str) -> None:
    hidden, weight = drawn(device, FP32, (203, 40), (1001, 40))
    labels = torch.randint(1001, (203,), generator=torch.Generator().manual_seed(1)).to(device)
    weights = torch.linspace(0.1, 1, 203, device=device)
    leaves = [hidden, weight] if trained else [hidden]
    got = chosen_logps(hidden, weight if trained else weight.detach(), None, labels, weights, shape, (64, 128))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = plain_logps(wide[0], wide[1], None, labels, shape)
    near(got, want, 1e-6)
    ours = torch.autograd.grad((got * weights).sum(), leaves)
    theirs = torch.autograd.grad((want * weights).sum(), wide[: len(leaves)])
    for a, b in zip(ours, theirs, strict=True):
        near(a, b, 1e-5)


def test_the_head_under_autocast(device: str) -> None:
    hidden, weight = drawn(device, FP32, (203, 40), (1001, 40))
    labels = torch.arange(203, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = chosen_logps(hidden, weight, None, labels)
    near(got, plain_logps(hidden.double(), weight.double(), None, labels, Shape()), 1e-2)
    assert got.dtype == FP32 and all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), [hidden, weight]))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_fused_model_has_the_gradients_of_the_plain_one(dtype: torch.dtype, device: str) -> None:
    plain = tiny("Llama").to(device, dtype)
    fused = copy.deepcopy(plain)
    assert fuse(fused)["mlp"] == 2
    ids = torch.randint(3, 60, (2, 19), generator=torch.Generator().manual_seed(0)).to(device)
    for model in (plain, fused):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        near(a.grad, b.grad, 1e-5 if dtype == FP32 else 5e-2)


def test_whole_numbers_of_a_cache(device: str) -> None:
    (x,) = drawn(device, FP32, (5, 3, 40))
    whole, factor = quantised(x.detach())
    near(whole * factor[..., None], x.detach(), 1e-2)


def test_activations_that_wait_on_the_host_give_equal_gradients(gpu: str) -> None:
    found = []
    for away in (False, True):
        model = tiny("Llama").to(gpu)
        ids = torch.randint(3, 60, (64, 100), generator=torch.Generator().manual_seed(0)).to(gpu)
        offload = Offload(model.parameters(), Pinned(), least=1 if away else 1 << 40)
        with offload.keeping():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        assert bool(offload.moved) == away
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        near(a, b, 1e-5)
