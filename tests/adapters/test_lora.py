"""LoRA: nothing at the start, its parameters by the formula, its sums those of peft, its merge exact."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmkit.adapters.lora import FusedLora
from llmkit.adapters.node import Lora, NoAdapter
from llmkit.core.errors import ModelError
from llmkit.models.fused import fuse
from tests.conftest import make_model

IDS = torch.arange(3, 40)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def close(a, b, tol=1e-6):
    assert (a - b).abs().max() <= tol * b.abs().max()


def stirred(model):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model


@pytest.mark.parametrize("more", [{}, {"rslora": True}, {"dora": True}], ids=str)
def test_no_op_at_first_and_parameters_by_the_formula(more):
    base = make_model().eval()
    before, weights = logits(base), {n: p.clone() for n, p in base.named_parameters()}
    model = Lora(rank=4, **more).attach(base).eval()
    close(logits(model), before)
    linears = [
        m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "lora" not in n and "head" not in n
    ]
    formula = 4 * sum(m.in_features + m.out_features for m in linears)
    formula += sum(m.out_features for m in linears) if more.get("dora") else 0
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == formula
    stirred(model)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    opt.step()
    after = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(after[n], p) for n, p in weights.items())


def test_the_fused_layer_has_pefts_values_and_gradients():
    ours, theirs = make_model(), make_model()
    fuse(ours)
    a = stirred(Lora(rank=4).attach(ours)).train()
    b = stirred(get_peft_model(theirs, LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"))).train()
    assert sum(isinstance(m, FusedLora) for m in a.modules()) == 14
    b.load_state_dict(a.state_dict())
    grads = []
    for model in (a, b):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 28
    for name, grad in grads[0].items():
        close(grad, grads[1][name], 5e-6)  # sums in another order: 2.5e-6 on some processors


@pytest.mark.parametrize("more", [{}, {"rslora": True}, {"dora": True}], ids=str)
def test_merged_equals_adapted(more):
    model = stirred(Lora(rank=4, alpha=4, **more).attach(make_model().eval())).eval()
    adapted = logits(model)
    close(logits(model.merge_and_unload()), adapted, 2e-6)


def test_dropout_and_a_disabled_adapter_take_pefts_way():
    model = stirred(Lora(rank=4, dropout=0.5).attach(make_model())).train()
    torch.manual_seed(0)
    first = model(input_ids=IDS, use_cache=False).logits
    second = model(input_ids=IDS, use_cache=False).logits
    assert not torch.equal(first, second)
    model.eval()
    with model.disable_adapter():
        close(logits(model), logits(make_model().eval()))


def test_targets_that_name_nothing_are_an_error_with_what_there_is():
    with pytest.raises(
        ModelError, match=r"adapter\.targets: .*nonsense.* fix: use all-linear, or name endings such as down_proj"
    ):
        Lora(targets=("nonsense",)).attach(make_model())


def test_no_adapter_trains_everything():
    model = NoAdapter().attach(make_model().requires_grad_(False))
    assert all(p.requires_grad for p in model.parameters())
