"""The serving twin: the same model and the same weights, under forwards of which a row does not depend on others."""

from __future__ import annotations

import pytest
import torch
from llmkit_kernels.build import lacks

from llmkit.core.errors import ModelError
from llmkit.core.types import Packed, Segment
from llmkit.models import ordered
from llmkit.models.attend import install
from llmkit.models.decoder import Decoder
from llmkit.models.families import tiny
from llmkit.models.fused import fuse
from llmkit.models.ordered import Ordered, elementwise, product
from llmkit.models.served import ServedMlp, ServedNorm, ServedShiftedNorm
from llmkit.models.served_linears import ServedLinear
from llmkit.models.serving import serving

here = pytest.mark.skipif(bool(lacks("linear")), reason=lacks("linear"))
FAMILIES = ("Llama", "Gemma-2", "Gemma-3", "Mixtral", "gpt-oss", "DeepSeek-V3", "GPT-2", "Phi-3, RoPE longrope")


def ready(family):
    model = tiny(family).eval()
    install(model, "auto")
    fuse(model)
    return model


def logits(model, tokens):
    attend = Packed((Segment(0, 0, tokens.shape[1]),))
    with torch.no_grad():
        return model(tokens, position_ids=torch.arange(tokens.shape[1])[None], attend=attend, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_computes_what_its_model_does(family):
    model, tokens = ready(family), torch.arange(3, 24)[None]
    want, made = logits(model, tokens), logits(serving(model), tokens)
    assert (made - want).abs().max() <= 1e-5 * want.abs().max()


@here
def test_it_has_one_set_of_weights_and_modules_of_its_own():
    model, tokens = ready("Gemma-2"), torch.arange(3, 10)[None]
    made, before = serving(model), [type(module) for module in model.modules()]
    kinds = {type(module) for module in made.modules()}
    assert {ServedLinear, ServedShiftedNorm} <= kinds
    assert [type(module) for module in model.modules()] == before and type(model.lm_head) is torch.nn.Linear
    pairs = zip(model.named_parameters(), made.named_parameters(), strict=True)
    assert all(name == same and one is other for (name, one), (same, other) in pairs)
    was = logits(made, tokens)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
    assert not logits(made, tokens).equal(was) and logits(made, tokens).equal(logits(serving(model), tokens))
    made.model.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    logits(model, tokens)  # what is hung on a twin is on no other


@here
def test_what_a_llama_is_made_of():
    kinds = [type(module) for module in serving(ready("Llama")).modules()]
    assert kinds.count(ServedLinear) == 15 and kinds.count(ServedMlp) == 2 and kinds.count(ServedNorm) == 5


def test_an_adapter_of_peft_goes_through_the_same_linears():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(ready("Llama"), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tokens, made = torch.arange(3, 24)[None], serving(model.eval())
    want = logits(model, tokens)
    assert (logits(made, tokens) - want).abs().max() <= 1e-5 * want.abs().max()
    if not lacks("linear"):
        inside = made.get_base_model().model.layers[0].self_attn.q_proj
        assert {type(inside.base_layer), type(inside.lora_A["default"])} == {ServedLinear}


def test_rotations_do_not_depend_on_what_they_are_made_with():
    turned = serving(ready("Gemma-3")).model.rotary_emb if not lacks("linear") else None
    if turned is None:
        pytest.skip(lacks("linear"))
    x, all_ = torch.zeros(1), torch.arange(2500)[None]
    for kind in ("sliding_attention", "full_attention"):
        cos, sin = turned(x, all_, kind)
        for places in (torch.tensor([[7]]), torch.tensor([[2400, 3, 3, 1023, 1024]])):
            one, two = turned(x, places, kind)
            assert one.equal(cos[:, places[0]]) and two.equal(sin[:, places[0]])


def test_elements_are_the_same_wherever_they_lie():
    x = torch.randn(70_001, generator=torch.Generator().manual_seed(0)) * 4
    before = torch.get_num_threads()
    for function in (torch.tanh, torch.nn.functional.silu, torch.exp):
        whole = elementwise(function, x)
        assert whole.allclose(function(x)) and whole.equal(torch.cat([elementwise(function, x[:3]), whole[3:]]))
        try:
            torch.set_num_threads(3)
            for start, end in ((0, 70_001), (5, 69_999), (17, 33_000), (1, 2)):
                assert elementwise(function, x[start:end]).equal(whole[start:end])
        finally:
            torch.set_num_threads(before)


def test_functions_inside_have_one_order_too():
    x, weight, bias = torch.randn(19, 40), torch.randn(24, 40), torch.randn(24)
    with torch.no_grad(), Ordered():
        made = {
            "linear": torch.nn.functional.linear(x, weight, bias),
            "matmul": x @ weight.T + bias,
            "addmm": torch.addmm(bias, x, weight.T),
            "gate": (x @ weight.T).sigmoid(),
        }
        alone = torch.nn.functional.linear(x[4:5], weight, bias)
    assert alone.equal(made["linear"][4:5])
    for name in ("matmul", "addmm"):
        assert made[name].allclose(made["linear"], atol=1e-5)
    assert made["gate"].allclose((x @ weight.T).sigmoid(), atol=1e-6)


def test_without_the_kernel_order_is_kept_where_it_is_asked_for(uncompiled):
    model = ready("Llama")
    assert not Decoder(model).exact and Decoder(model, exact=True).exact
    assert ordered.row() == "" and "16 rows" in ordered.row(exact=True)
    x, weight, bias = torch.randn(37, 48), torch.randn(30, 48), torch.randn(30)
    whole = product(x, weight, bias)
    assert whole.allclose(torch.nn.functional.linear(x, weight, bias), atol=1e-5)
    for count in (1, 5, 16, 20):
        assert product(x[-count:], weight, bias).equal(whole[-count:])
    assert product(x[:0], weight).shape == (0, 30)


def test_what_is_no_fp32_on_a_cpu_is_left_as_it_is_and_refused_where_order_is_asked_for():
    model = ready("Llama").to(torch.bfloat16)
    assert ServedLinear not in {type(module) for module in serving(model).modules()} and not Decoder(model).exact
    with pytest.raises(ModelError, match="bfloat16 on cpu, not fp32 on a CPU"):
        serving(model, exact=True)


def test_rotations_by_the_length_of_a_sequence_have_no_order_to_keep():
    model = ready("Phi-3, RoPE longrope")
    assert not Decoder(model).exact
    with pytest.raises(ModelError, match="rotations follow the length"):
        Decoder(model, exact=True)


def test_eager_attention_is_left_unless_order_is_asked_for():
    model = tiny("Llama").eval()
    install(model, "eager")
    assert not Decoder(model).exact and Decoder(model, exact=True).exact
    assert model.config._attn_implementation == "llmkit_plain"
