"""Quantised bases: the error of their blocks, and gradients that survive an evaluation in between."""

import pytest
import torch

from llmkit.adapters.node import Lora
from llmkit.build.support_files import write
from llmkit.core.errors import ModelError
from llmkit.models.load import How, load
from llmkit.models.node import Int8, ModelRef, Nf4
from llmkit.models.resolve import resolve

IDS = torch.arange(3, 35)[None]


def opened(tiny, quant):
    ref = ModelRef(name=str(tiny))
    loaded = load(resolve(ref), ref, How(quant=quant))
    loaded.model.requires_grad_(False)
    torch.manual_seed(0)
    model = Lora(rank=4).attach(loaded.model)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model.train()


def gradients(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("quant", [Nf4(), Nf4(double=False), Int8(), Int8(threshold=0.0)], ids=str)
def test_train_evaluate_train_gives_the_same_gradients(tiny, quant):
    model = opened(tiny, quant)
    first = gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    model.train()
    again = gradients(model)
    assert len(first) > 10
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_nf4_holds_normal_weights_to_a_relative_error_of_nine_percent():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weights = torch.randn(256, 256)
    packed, held = quantize_4bit(weights, blocksize=64, quant_type="nf4")
    off = (dequantize_4bit(packed, held) - weights).norm() / weights.norm()
    assert 0.08 < off < 0.10


def test_the_quantised_model_is_near_the_plain_one(tiny):
    ref = ModelRef(name=str(tiny))
    logits = {}
    for name, quant in (("plain", None), ("nf4", Nf4()), ("int8", Int8())):
        model = load(resolve(ref), ref, How(**({"quant": quant} if quant else {}))).model
        with torch.no_grad():
            logits[name] = model(input_ids=IDS).logits
    top = logits["plain"].abs().max()
    assert 0 < (logits["nf4"] - logits["plain"]).abs().max() / top < 0.5
    assert 0 < (logits["int8"] - logits["plain"]).abs().max() / top < 0.05


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("Falcon", r"quant\.kind: none of the linears of FalconForCausalLM can be quantised; fix: drop quant"),
        ("Mamba", r"quant\.kind: MambaForCausalLM does not run with quantised weights \(.*\); fix: drop quant"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_family_that_is_not_or_cannot_be_quantised_is_refused(family, said, tmp_path):
    ref = ModelRef(name=str(write(family, tmp_path / "base")))
    load(resolve(ref), ref, How())
    with pytest.raises(ModelError, match=said):
        load(resolve(ref), ref, How(quant=Nf4()))
