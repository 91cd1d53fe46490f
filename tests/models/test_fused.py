"""Fused twins against the modules that they replace."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from llmkit.core.matmul import linear, through
from llmkit.models.families import tiny
from llmkit.models.fused import FusedLinear, FusedMlp, fuse


def close(a, b, tol=1e-6):
    assert (a - b).abs().max() <= tol * b.abs().max() + 1e-12


@pytest.mark.parametrize("n,i,o", [(1, 7, 5), (33, 16, 48), (0, 4, 4)])
def test_products_equal_torch(n, i, o):
    x, w, g = torch.randn(n, i), torch.randn(o, i), torch.randn(n, o)
    torch.testing.assert_close(linear(x, w), x @ w.T)
    torch.testing.assert_close(through(g, w), g @ w)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_model_keeps_its_outputs_gradients_and_names(trained, bias):
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    plain = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, mlp_bias=bias, attention_bias=bias))
    fast = LlamaForCausalLM(plain.config)
    fast.load_state_dict(plain.state_dict())
    counts = fuse(fast)
    assert counts == {"linear": 14, "mlp": 2, "norm": 5}
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert isinstance(fast.model.layers[0].mlp, FusedMlp) and type(fast.lm_head) is nn.Linear
    ids = torch.randint(50, (2, 9))
    grads = []
    for model in (fast, plain):
        model.requires_grad_(trained)
        vectors = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=vectors, use_cache=False).logits.square().sum().backward()
        grads.append([vectors.grad, *[p.grad for p in model.parameters() if p.grad is not None]])
    assert len(grads[0]) == len(grads[1]) > (1 if trained else 0)
    for a, b in zip(*grads, strict=True):
        close(a, b, 3e-6)


def test_an_mlp_with_another_activation_stays_as_it_is():
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=1, head_dim=12))
    assert fuse(model)["mlp"] == 0


def test_bf16_and_autocast_take_torchs_own_way():
    layer = nn.Sequential(nn.Linear(8, 4))
    fuse(layer)
    assert isinstance(layer[0], FusedLinear)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["Qwen3-Next", "Granite-hybrid"])
@pytest.mark.filterwarnings("ignore")
def test_a_norm_with_a_gate_beside_it_stays_as_it_is(family):
    model, ids = tiny(family).eval(), torch.arange(3, 14)[None]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        counts = fuse(model)
        close(model(input_ids=ids, use_cache=False).logits, before, 1e-5)
    assert counts["linear"] > 5
    assert any("Gated" in type(module).__name__ for module in model.modules())


def test_torch_s_norm_in_16_bits_rounds_as_transformers_does():
    """What a GPU runs in one kernel: the norm in fp32, rounded, times the weight."""
    x, weight = torch.randn(7, 24).bfloat16(), torch.randn(24).bfloat16()
    wide = x.float()
    want = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    got = weight * nn.functional.rms_norm(x, (24,), None, 1e-6)
    assert (got == want).float().mean() > 0.98 and torch.allclose(got.float(), want.float(), rtol=1e-2)
