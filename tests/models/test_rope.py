"""RoPE scaling: tables are transformers' own, lengths and refusals are right, files carry it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmkit.core.errors import ModelError, RecipeError
from llmkit.models.families import FAMILIES, SMALL
from llmkit.models.node import ModelRef
from llmkit.models.rope import GLOBAL, Dynamic, Linear, Llama3, LongRope, Yarn, head_size, reach
from llmkit.models.scaled import check_turned

TRAINED = 128
PAIRS = 4
SHORT, LONG = [1.0, 1.5, 2.0, 2.5], [1.5, 2.5, 4.0, 8.0]
NODES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (Linear(factor=4), {"factor": 4.0}),
    "dynamic": (Dynamic(factor=4), {"factor": 4.0}),
    "yarn": (
        Yarn(factor=4, beta_fast=16, beta_slow=2),
        {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "original_max_position_embeddings": TRAINED},
    ),
    "longrope": (
        LongRope(factor=4, short_factor=SHORT, long_factor=LONG),
        {"factor": 4.0, "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": TRAINED},
    ),
    "llama3": (
        Llama3(factor=4, high_freq_factor=8),
        {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 8.0,
            "original_max_position_embeddings": TRAINED,
        },
    ),
}
ROTATING = (
    *("Llama", "Qwen2", "Qwen3", "Gemma-2", "Gemma-3", "Mistral", "Phi-3", "Mixtral", "Qwen3-MoE", "OLMo-2"),
    *("SmolLM3", "Granite", "Cohere-2", "gpt-oss"),
)


def configured(family: str, **more: Any) -> Any:
    kind, changes = FAMILIES[family]
    return getattr(transformers, kind)(**{**SMALL, **changes, **more})


def rotary(config: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(config)
    return next(module for module in model.modules() if hasattr(module, "rope_type"))


def table(module: Any, nested: bool) -> tuple[torch.Tensor, float]:
    prefix = f"{GLOBAL}_" if nested else ""
    return getattr(module, f"{prefix}inv_freq"), getattr(module, f"{prefix}attention_scaling")


@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("family", ROTATING)
def test_tables_equal_those_of_transformers_made_without_us(family: str, kind: str) -> None:
    node, said = NODES[kind]
    ours, nested = configured(family), family == "Gemma-3"
    plain = rotary(configured(family))
    if family == "Phi-3" and kind != "longrope":  # transformers would not load it again
        with pytest.raises(ModelError, match=rf"^model\.rope\.kind: phi3 does not take RoPE `{kind}`"):
            node.apply(ours)
        return
    node.apply(ours)
    made = rotary(ours)
    theta = (ours.rope_parameters[GLOBAL] if nested else ours.rope_parameters)["rope_theta"]
    given: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, **said}
    if nested:
        given = {GLOBAL: given, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    length = TRAINED if kind == "dynamic" else 4 * TRAINED
    more = {"original_max_position_embeddings": TRAINED} if family == "Phi-3" else {}
    theirs = configured(family, rope_parameters=given, max_position_embeddings=length, **more)
    wanted = ROPE_INIT_FUNCTIONS[kind](theirs, None, **({"layer_type": GLOBAL} if nested else {}))
    inv_freq, scaling = table(made, nested)
    assert torch.equal(inv_freq, wanted[0])
    assert scaling == wanted[1]
    assert ours.max_position_embeddings == length and reach(ours, node) == 4 * TRAINED
    if kind != "dynamic":  # the control: it is another table than without
        assert not torch.equal(inv_freq, table(plain, nested)[0])
    if nested:  # the window's layers stay as they are
        assert torch.equal(made.sliding_attention_inv_freq, plain.sliding_attention_inv_freq)


@pytest.mark.parametrize("family", ["Llama", "Gemma-3", "Phi-3", "gpt-oss"])
def test_a_configuration_comes_back_from_its_file(family: str, tmp_path: Any) -> None:
    for kind, (node, _) in NODES.items():
        if family == "Phi-3" and kind != "longrope":
            continue
        config = configured(family)
        node.apply(config)
        config.save_pretrained(tmp_path / kind)
        again = transformers.AutoConfig.from_pretrained(tmp_path / kind)
        assert again.rope_parameters == config.rope_parameters
        assert again.max_position_embeddings == config.max_position_embeddings
        nested = family == "Gemma-3"
        assert torch.equal(table(rotary(again), nested)[0], table(rotary(config), nested)[0])


def test_linear_by_s_at_p_is_unscaled_at_p_over_s_also_beyond_the_trained_length() -> None:
    config = configured("Llama")
    Linear(factor=8).apply(config)
    positions = torch.arange(0, 8 * TRAINED, 8)[None]
    x = torch.zeros(1, dtype=torch.float32)
    scaled, plain = rotary(config)(x, positions), rotary(configured("Llama"))(x, positions // 8)
    for ours, theirs in zip(scaled, plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", NODES)
def test_beyond_the_trained_length_cosines_are_those_of_the_table(kind: str) -> None:
    config = configured("Llama")
    NODES[kind][0].apply(config)
    module, length = rotary(config), 4 * TRAINED
    cos, sin = module(torch.zeros(1), torch.arange(length)[None])
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=length)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * inv_freq.double()
    assert torch.allclose(cos[0, :, :PAIRS].double(), angles.cos() * scaling, atol=1e-4)
    assert torch.allclose(sin[0, :, PAIRS:].double(), angles.sin() * scaling, atol=1e-4)


def test_every_field_reaches_the_configuration() -> None:
    config = configured("Llama")
    Yarn(
        factor=2, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=0.9, truncate=False, theta=5e5
    ).apply(config)
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "truncate": False,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "rope_theta": 5e5,
    }
    assert config.max_position_embeddings == 128
    config = configured("Llama")
    Llama3(factor=8, max_position_embeddings=16 * TRAINED).apply(config)
    assert (config.max_position_embeddings, config.rope_parameters["factor"]) == (16 * TRAINED, 8.0)
    config = configured("Llama")
    Yarn(factor=2, attention_factor=1.25).apply(config)
    assert rotary(config).attention_scaling == 1.25
    config = configured("Llama")
    Dynamic(factor=2, original_max_position_embeddings=32).apply(config)
    assert config.max_position_embeddings == 32


def test_phi_3_keeps_its_share_of_turned_dimensions() -> None:
    config = configured("Phi-3", partial_rotary_factor=0.5)
    with pytest.raises(ModelError, match=r"^model\.rope\.long_factor: has 4 factors, and phi3 turns 2 pairs"):
        NODES["longrope"][0].apply(config)
    LongRope(factor=4, long_factor=[2.0, 4.0]).apply(config)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.rope_parameters["short_factor"] == [1.0, 1.0]
    assert rotary(config).inv_freq.shape == (2,)


@pytest.mark.parametrize("family", ["BLOOM", "GPT-J", "GPT-2", "Falcon"])
def test_a_model_without_rope_is_refused(family: str) -> None:
    whole = {"GPT-2": transformers.GPT2Config(), "Falcon": transformers.FalconConfig(alibi=True)}
    config = whole.get(family) or configured(family)
    with pytest.raises(ModelError, match=r"^model\.rope: \w+ has no RoPE that could be scaled; fix: drop model\.rope$"):
        Linear(factor=2).apply(config)


def test_a_kind_whose_settings_a_family_cannot_check_is_refused_and_no_fault() -> None:
    with pytest.raises(ModelError, match=r"model\.rope\.kind: phimoe does not take RoPE `linear`: .*short_mscale"):
        Linear(factor=2).apply(configured("Phi-3.5-MoE"))


def test_a_base_that_stays_is_no_moving_one_and_is_replaced_whole() -> None:
    from llmkit.models.rotary import moving

    config = configured("HunYuan")
    assert config.rope_parameters["rope_type"] == "dynamic"
    assert moving(transformers.AutoModelForCausalLM.from_config(config)) == ""
    Dynamic(factor=2, replace=True).apply(config)
    assert "alpha" not in config.rope_parameters
    assert moving(transformers.AutoModelForCausalLM.from_config(config)) == "dynamic"


def test_where_layers_have_two_head_sizes_the_global_one_counts() -> None:
    assert head_size(configured("Gemma-4")) == 16 and configured("Gemma-4").per_layer_config[0].head_dim == 8
    with pytest.raises(ModelError, match="gemma4_text turns"):
        LongRope(factor=2, long_factor=[2.0] * 3).apply(configured("Gemma-4"))


def test_a_scaling_of_its_own_is_replaced_only_where_that_is_said() -> None:
    def scaled() -> Any:
        config = configured("Llama")
        Llama3(factor=8).apply(config)
        return config

    with pytest.raises(ModelError, match=r"llama has RoPE `llama3` of its own; .*model\.rope\.replace=true"):
        Yarn(factor=4).apply(scaled())
    config = scaled()
    Yarn(factor=16, replace=True).apply(config)
    assert config.rope_parameters["original_max_position_embeddings"] == TRAINED
    assert config.max_position_embeddings == 16 * TRAINED
    assert "low_freq_factor" not in config.rope_parameters
    config = configured("Llama")
    Linear(factor=4).apply(config)
    with pytest.raises(ModelError, match="does not say the trained length"):
        Yarn(factor=8, replace=True).apply(config)
    Yarn(factor=8, replace=True, original_max_position_embeddings=TRAINED).apply(config)
    assert config.max_position_embeddings == 8 * TRAINED


def test_rounding_cannot_be_left_out_where_transformers_always_rounds() -> None:
    with pytest.raises(ModelError, match=r"model\.rope\.truncate"):
        Yarn(factor=4, truncate=False).apply(configured("Gemma-3"))


def test_a_family_that_turns_in_a_way_of_its_own_is_found_when_it_is_made() -> None:
    for family in ("Granite-hybrid", "Llama"):
        config = configured(family)
        node = Yarn(factor=4)
        node.apply(config)
        model = transformers.AutoModelForCausalLM.from_config(config)
        if family == "Llama":
            check_turned(model, node)
            continue
        with pytest.raises(ModelError, match="GraniteMoeHybridForCausalLM turns in a way of its own"):
            check_turned(model, node)


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        ({"kind": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}, ("rope.beta_fast", "rope.beta_slow")),
        ({"kind": "yarn", "factor": 2, "mscale": 1}, ("rope.mscale", "rope.mscale_all_dim")),
        ({"kind": "llama3", "factor": 2, "low_freq_factor": 4}, ("rope.high_freq_factor", "rope.low_freq_factor")),
        (
            {"kind": "longrope", "factor": 2, "long_factor": [1, 2], "short_factor": [1]},
            ("rope.short_factor", "rope.long_factor"),
        ),
        ({"kind": "longrope", "factor": 2, "long_factor": [0, 2]}, ("rope.long_factor",)),
        (
            {"kind": "llama3", "factor": 2, "max_position_embeddings": 64, "original_max_position_embeddings": 64},
            ("rope.max_position_embeddings", "rope.original_max_position_embeddings"),
        ),
        ({"kind": "linear", "factor": 0.5}, ("rope.factor",)),
    ],
)
def test_contradictions_name_both_keys(rope: dict[str, Any], keys: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as told:
        ModelRef(name="x", rope=rope)
    assert all(key in str(told.value) for key in keys)
