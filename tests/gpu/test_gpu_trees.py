"""Prompts that are computed once for their answers on a device: losses and gradients are those of a prompt each."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llmkit.adapters.node import Lora
from llmkit.core.types import Needs
from llmkit.data.batches import micro_batches
from llmkit.data.node import FirstFit
from llmkit.models.attend import install
from llmkit.models.compare import FLAT, Doubled, exact, off
from llmkit.models.families import tiny
from llmkit.models.heads import Scored
from llmkit.models.logps import plain_logps
from tests.gpu.conftest import placed
from tests.models.test_shared_prompts import drawn

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
CLOSE = {FP64: 1e-10, FP32: 1e-5}
NEAR = 0.1
"""Of the norm of a gradient, in 16 bits."""
FAMILIES = ("Llama", "Gemma-2", "Mistral")
"""Plain, with a soft-cap and windows, with windows alone."""
HERE = ("Gemma-2", "Mistral")
"""What the CPU tries, of every weight; tests/models/test_shared_prompts.py has the others."""


def scored(family: str, dtype: torch.dtype, device: str, adapter: bool = False) -> Scored:
    model = exact(tiny(family, 0.05)) if dtype == FP64 else tiny(family, 0.05)
    model = model.to(device, dtype)
    install(model, "auto", half=dtype == BF16)
    if adapter:
        torch.manual_seed(3)
        model = Lora(rank=4).attach(model).to(device, dtype)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    return Scored(model.eval())


def logps(made: Scored, batch: Any, dtype: torch.dtype) -> Tensor:
    """The head's, or in fp64 its plain twin's."""
    if dtype != FP64:
        return made(batch, Needs(by_weight=False))
    chosen, head = batch.weights != 0, made.causal[0].get_output_embeddings()
    return plain_logps(made.hidden(batch)[chosen], head.weight, head.bias, batch.labels[chosen], made.shape)


def learned(made: Scored, trees: bool, dtype: torch.dtype, device: str) -> tuple[float, dict[str, Tensor]]:
    """A loss over sums of completions, and its gradients."""
    made.zero_grad()
    groups, total = drawn(4, 5, most=30), 0.0
    factors = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=FP64).to(device)
    with Doubled() if dtype == FP64 else nullcontext():
        for batch in micro_batches(groups, range(len(groups)), FirstFit(), 4096, 64, True, device, trees=trees):
            each, branches = logps(made, batch, dtype), batch.branches
            sums = each.new_zeros(len(branches.group)).index_add(0, branches.of, each)
            loss = (-logsigmoid(sums * 0.1) * factors[: len(sums)].to(sums)).sum()
            loss.backward()
            total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("adapter", "family", "dtype", "device"),
    placed(product((False, True), FAMILIES, (FP64, FP32)), lambda adapter, family, _: not adapter and family in HERE),
    indirect=["device"],
)
def test_a_shared_prompt_teaches_what_a_prompt_each_does(
    adapter: bool, family: str, dtype: torch.dtype, device: str
) -> None:
    made = scored(family, dtype, device, adapter)
    (ours, mine), (plain, theirs) = (learned(made, trees, dtype, device) for trees in (True, False))
    assert ours == pytest.approx(plain, rel=CLOSE[dtype])
    assert mine.keys() == theirs.keys() and len(mine) > 4
    least = FLAT * max(float(grad.abs().max()) for grad in theirs.values())
    assert max(off(mine[name], theirs[name], least) for name in theirs) <= CLOSE[dtype]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_16_bits_it_is_near(family: str, adapter: bool, gpu: str) -> None:
    """Both are near what fp32 makes of the same numbers, and a shared prompt as near as a prompt each: windows go
    another way there (flash) than trees do (pieces of sdpa)."""
    made, wide = scored(family, BF16, gpu, adapter), scored(family, FP32, gpu, adapter)
    wide.load_state_dict(made.state_dict())
    _, true = learned(wide, False, FP32, gpu)
    size, gaps = sum(float(grad.square().sum()) for grad in true.values()) ** 0.5, []
    for trees in (True, False):
        _, found = learned(made, trees, BF16, gpu)
        gaps.append(sum(float((found[name].float() - true[name]).square().sum()) for name in true) ** 0.5 / size)
    assert gaps[0] <= min(NEAR, 1.5 * gaps[1]), gaps
