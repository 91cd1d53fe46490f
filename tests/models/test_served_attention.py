"""The short way through an attention layer: where it is taken, and that it moves no bit."""

from __future__ import annotations

import pytest
import torch
from llmkit_kernels.build import lacks
from torch import Tensor, nn

from llmkit.adapters.lora import attach
from llmkit.adapters.method import Around
from llmkit.adapters.node import Lora
from llmkit.core.types import Packed, Paged, Segment, Span
from llmkit.models.attend import install
from llmkit.models.decoder import Decoder
from llmkit.models.families import tiny
from llmkit.models.fused import fuse
from llmkit.models.paged import BlockStore
from llmkit.models.served_attention import ServedAttention
from llmkit.models.served_linears import ServedLora
from llmkit.models.serving import serving
from tests.conftest import make_model

here = pytest.mark.skipif(bool(lacks("linear") or lacks("paged")), reason=lacks("linear") or lacks("paged"))
SHORT = ("Llama", "Qwen2", "Qwen3", "Gemma-2", "Gemma-3", "Mistral", "Mixtral", "Granite", "GLM-4-MoE")
OWN = ("Phi-3", "gpt-oss", "OLMo-2", "GLM", "GPT-2", "DeepSeek-V3", "Cohere")


def ready(model: nn.Module, kind: str = "auto") -> nn.Module:
    model.eval()
    install(model, kind)
    fuse(model)
    return model


def short(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module.__dict__.get("forward"), ServedAttention)]


def lengthened(model: nn.Module) -> None:
    """Gives layers their family's forward back."""
    for module in short(model):
        del module.forward


@torch.no_grad()
def stepped(made: Decoder, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Hidden states of two prompts, and then of one token of each beside a new prompt."""
    store, drawn, outs = BlockStore(16, 4, dtype), torch.Generator().manual_seed(0), []
    for spans in ([(9, 0, 0), (5, 0, 4)], [(1, 9, 0), (1, 5, 4), (7, 0, 8)]):
        at, laid = 0, []
        for count, past, first in spans:
            laid.append(Span(0, at, at + count, past, tuple(range(first, first + 4))))
            at += count
        places = torch.cat([torch.arange(past, past + count) for count, past, _ in spans])
        tokens = torch.randint(3, 60, (at,), generator=drawn)
        outs.append(made.hidden(tokens, places, Paged(store, tuple(laid)), [""] * len(spans)))
    return outs


@here
@pytest.mark.parametrize("family", SHORT)
def test_it_moves_no_bit(family: str) -> None:
    made = Decoder(ready(tiny(family)))
    assert len(short(made.model)) == 2
    for dtype in (None, torch.bfloat16, torch.int8):
        ours = stepped(made, dtype)
        plain = Decoder(ready(tiny(family)))
        lengthened(plain.model)
        assert not short(plain.model)
        assert all(a.equal(b) for a, b in zip(ours, stepped(plain, dtype), strict=True))


@here
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma-2"])
def test_a_lora_in_training_goes_the_short_way(family: str) -> None:
    model = attach(ready(tiny(family)), Lora(rank=4, alpha=8), Around()).eval()
    made, drawn = Decoder(model), torch.Generator().manual_seed(1)
    assert len(short(made.model)) == 2
    before = stepped(made)
    with torch.no_grad():  # as a step of training does, in place
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=drawn) * 0.3)
    ours, layers = stepped(made), [module for module in made.model.modules() if hasattr(module, "lora_A")]
    assert all(type(module.__dict__["forward"]) is ServedLora for module in layers) and len(layers) == 14
    lengthened(made.model)
    assert all(a.equal(b) for a, b in zip(ours, stepped(made), strict=True))
    for module in layers:
        del module.forward
    plain = stepped(made)
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(ours, plain, strict=True))
    assert not any(torch.allclose(a, b, rtol=1e-2) for a, b in zip(ours, before, strict=True))


@here
def test_heads_that_are_no_whole_vectors() -> None:
    sizes = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1}
    made = Decoder(ready(make_model(**sizes, head_dim=12)))
    ours = stepped(made)
    assert short(made.model)
    lengthened(made.model)
    assert all(a.equal(b) for a, b in zip(ours, stepped(made), strict=True))


@here
@pytest.mark.parametrize("family", OWN)
def test_a_layer_that_does_something_else_goes_its_own_way(family: str) -> None:
    assert not short(serving(ready(tiny(family))))


@here
def test_weights_that_change_in_place_are_seen() -> None:
    model = ready(tiny("Llama"))
    made = Decoder(model)
    before = stepped(made)[0]
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(2)
        model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight * 0.5
    changed = stepped(made)[0]
    assert not changed.equal(before) and changed.equal(stepped(Decoder(model))[0])


@here
def test_what_hangs_on_a_linear_is_called() -> None:
    made = Decoder(ready(tiny("Llama")))
    before, layer = stepped(made), made.causal.model.layers[1]
    for linear in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.gate_proj):
        hook = linear.register_forward_hook(lambda _, args, out: out + 1)
        assert not stepped(made)[0].equal(before[0])
        hook.remove()
    layer.self_attn.q_proj.forward = lambda x: torch.nn.functional.linear(x, layer.self_attn.q_proj.weight * 3)
    assert not stepped(made)[0].equal(before[0])
    del layer.self_attn.q_proj.forward
    own, layer.self_attn.k_proj = layer.self_attn.k_proj, nn.Sequential(layer.self_attn.k_proj, nn.Tanh())
    assert not stepped(made)[0].equal(before[0])
    layer.self_attn.k_proj = own
    assert all(a.equal(b) for a, b in zip(stepped(made), before, strict=True))


@here
def test_another_context_and_eager_attention_go_the_family_s_way() -> None:
    made, tokens = serving(ready(tiny("Llama"))), torch.arange(3, 13)[None]
    given = {"position_ids": torch.arange(10)[None], "attend": Packed((Segment(0, 0, 10),)), "use_cache": False}
    with torch.no_grad():
        ours = made(tokens, **given).logits
        lengthened(made)
        assert ours.equal(made(tokens, **given).logits)
    assert not short(serving(ready(tiny("Llama"), "eager")))
