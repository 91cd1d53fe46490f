"""The probe accepts what is exact, and refuses by name what is not."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkit.models.attend import install
from llmkit.models.families import tiny
from llmkit.models.probe import Support, probe


def probed(model: Any) -> Support:
    install(model, "auto")
    return probe(model)


def llama() -> Any:
    return tiny("Llama")


REFUSED = {
    "Qwen3-Next": "Qwen3NextForCausalLM has 1 of 2 layers of type linear_attention",
    "Granite-hybrid": "GraniteMoeHybridForCausalLM has 1 of 2 layers of type",
    "Falcon-H1": "FalconH1ForCausalLM has 2 of 2 layers of type hybrid",
    "Llama-4": "Llama4ForCausalLM has 2 of 2 layers of type chunked_attention",
    "Falcon": "FalconForCausalLM brings its own attention",
    "GPT-J": "GPTJForCausalLM brings its own attention",
    "BLOOM": "BloomForCausalLM brings its own attention",
    "StableLM": "StableLmForCausalLM hands the context to 0 of 2 attention layers",
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_are_refused_by_name(family: str) -> None:
    support = probed(tiny(family))
    assert (support.packed, support.tree, support.paged) == (False, False, False)
    assert support.reason.startswith(REFUSED[family])


def test_control_llama_takes_all() -> None:
    assert probed(llama()) == Support(True, True, True)


def test_moving_rope_is_refused_where_its_module_is_not_known() -> None:
    model = llama()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    support = probed(model)  # its rotary module was made for another kind: nothing here follows a length
    assert not support.packed and "RoPE `dynamic`, whose frequencies follow the longest segment" in support.reason


def test_moving_rope_that_turns_by_sequence_is_packed_and_shares_no_keys() -> None:
    support = probed(tiny("Phi-3, RoPE longrope"))
    assert (support.packed, support.tree, support.paged) == (True, False, False)
    assert support.reason == "Phi3ForCausalLM has RoPE `longrope`: keys turn by the length of their whole sequence"


def test_a_convolution_is_recurrent_state() -> None:
    model = llama()
    model.model.layers[1].mlp.conv = nn.Conv1d(4, 4, 2)
    assert "keeps recurrent state: model.layers.1.mlp.conv" in probed(model).reason


class Smeared(nn.Module):
    """Adds to each token the mean of those before it: what a recurrent layer does to packed rows."""

    def __init__(self, inner: nn.Module, strength: float) -> None:
        super().__init__()
        self.inner, self.strength = inner, strength

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1)[:, None]
        out: Tensor = self.inner(x + self.strength * x.cumsum(1) / counts)
        return out


@pytest.mark.parametrize(("strength", "packed"), [(0.3, False), (0.0, True)])
def test_state_that_nothing_names_is_found_by_its_values(strength: float, packed: bool) -> None:
    model = llama()
    model.model.layers[0].mlp = Smeared(model.model.layers[0].mlp, strength)
    support = probed(model)
    assert support.packed is packed
    assert packed or "gives packed sequences other values than alone" in support.reason


class Deaf(nn.Module):
    """A rotary embedding that counts tokens and does not listen to positions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return self.inner(x, torch.arange(x.shape[1])[None])


def test_dropped_positions_are_found() -> None:
    model = llama()
    model.model.rotary_emb = Deaf(model.model.rotary_emb)
    support = probed(model)
    assert support.packed  # rotary positions are relative, so a whole sequence may be shifted
    assert not support.tree
    assert not support.paged
    assert support.reason == "LlamaForCausalLM gives other values under a tree"


def test_a_window_that_never_reaches_attention_is_found() -> None:
    model = llama()
    model.config.sliding_window = 4
    assert "names its sliding window to 0 of 2 attention layers" in probed(model).reason


def test_a_soft_cap_that_never_reaches_attention_is_found() -> None:
    model = llama()
    model.config.attn_logit_softcapping = 4.0
    assert "does not name its soft-cap" in probed(model).reason


def test_the_model_and_the_random_state_are_as_before() -> None:
    model = llama().train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    drawn = []
    model.model.norm.register_forward_hook(lambda *_: drawn.append(torch.rand(1)))
    install(model, "auto")
    kind, state = model.config._attn_implementation, torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    probe(model)
    assert drawn  # something was random
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == kind
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_bf16_passes_and_is_still_checked() -> None:
    assert probed(llama().bfloat16()) == Support(True, True, True)
    model = llama()
    model.model.layers[0].mlp = Smeared(model.model.layers[0].mlp, 3.0)
    assert not probed(model.bfloat16()).packed


def test_it_is_quick() -> None:
    model = llama()
    probed(model)
    start = time.perf_counter()
    probe(model)
    assert time.perf_counter() - start < 1
