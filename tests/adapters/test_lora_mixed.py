"""LoRA over weights of 16 bits under autocast: fewer operations than peft's, and its numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from llmkit.adapters import lora, together
from llmkit.adapters.together import Part
from llmkit.models.families import tiny


def made() -> nn.Module:
    torch.manual_seed(0)
    given = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    return get_peft_model(tiny("Llama").to(torch.bfloat16), given, autocast_adapter_dtype=True)


def results(model: nn.Module, mixed: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradients of what is trained."""
    ids = torch.randint(3, 60, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = model(input_ids=ids, use_cache=False).logits
    out.float().sin().sum().backward()
    return out.float().detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_it_is_as_near_to_fp32_as_peft_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = made(), list[torch.dtype]()
    fused, wide = lora.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).float()
    work = watched(seen, lora.lora_linears)
    monkeypatch.setattr(lora, "lora_linears", work)
    monkeypatch.setattr(together, "lora_linears", work)
    (ours, own), (theirs, grads), (exact, true) = results(fused), results(plain), results(wide, False)
    assert seen and all(kind == torch.bfloat16 for kind in seen)
    assert own.keys() == grads.keys() == true.keys() and own
    assert (ours - exact).norm() <= 1.3 * (theirs - exact).norm()
    off = [sum(float((made[name] - true[name]).norm() ** 2) for name in true) for made in (own, grads)]
    assert off[0] <= 1.3 * off[1] and all(grad.dtype == torch.float32 for grad in own.values())


def watched(seen: list[torch.dtype], work: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`work`, which tells the type of what it gives."""

    def run(x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
        outs = work(x, parts)
        seen.extend(out.dtype for out in outs)
        return outs

    return run
