"""Adapters as peft saves them: whatever the method, its folder loads, and a tensor too few or too many is named."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llmkit.core.errors import ModelError
from llmkit.models.load import How, load
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from tests.conftest import make_model

IDS = torch.arange(3, 40)[None]
METHODS = {
    "lora": LoraConfig(r=2, target_modules="all-linear"),
    "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    "rslora": LoraConfig(r=2, target_modules="all-linear", use_rslora=True),
    "biases": LoraConfig(r=2, target_modules="all-linear", bias="lora_only"),
    "whole modules": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    "embeddings": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "single tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 7]),
    "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.fixture(params=METHODS)
def adapter(request, tiny, tmp_path):
    """(an adapted model, its folder)."""
    torch.manual_seed(1)
    model = get_peft_model(make_model(), METHODS[request.param]).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    model.peft_config["default"].base_model_name_or_path = str(tiny)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def opened(folder):
    ref = ModelRef(name=str(folder))
    return load(resolve(ref), ref, How()).model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_an_adapter_of_any_method_loads_as_it_was_saved(adapter, tiny):
    model, folder = adapter
    torch.testing.assert_close(logits(opened(folder)), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(opened(tiny))).abs().max() > 1e-3  # the control: the adapter does something


def test_a_tensor_too_few_or_too_many_is_named(adapter):
    weights = adapter[1] / "adapter_model.safetensors"
    held = load_file(weights)
    gone = min(name for name in held if "embed" not in name)  # whole embeddings may be left out
    save_file({name: value for name, value in held.items() if name != gone}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"lacks {gone.replace('.', '[.]')};"):
        opened(adapter[1])
    save_file(held | {"base_model.model.more.weight": torch.zeros(2)}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has no place for base_model\.model\.more\.weight;"):
        opened(adapter[1])
