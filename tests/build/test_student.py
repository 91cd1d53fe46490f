"""A small model made of a model's layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmkit.build.student import student_of
from llmkit.core.errors import ModelError, RecipeError
from llmkit.models.families import FAMILIES, SMALL
from llmkit.models.families import tiny as family
from llmkit.models.load import Loaded
from llmkit.models.probe import Support
from llmkit.models.resolve import Resolved
from tests.conftest import make_model, make_tokenizer


def loaded(model: Any) -> Loaded:
    return Loaded(model.eval(), make_tokenizer(), "sdpa", Support(True, True, True), Resolved("m", Path(), "", "", ""))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(3, 12)[None], use_cache=False).logits
    return out


def deep(name: str, **sizes: Any) -> Any:
    """A model of the family with other sizes."""
    kind, changes = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SMALL, **changes, **sizes})
    return transformers.AutoModelForCausalLM.from_config(config)


def test_layers_are_the_models_own() -> None:
    model = make_model(num_hidden_layers=5, initializer_range=0.2)
    made = student_of(loaded(model), 3, None, 0)
    assert made.config.num_hidden_layers == 3
    for ours, theirs in zip(made.model.layers, (0, 2, 4), strict=True):
        assert torch.equal(ours.mlp.up_proj.weight, model.model.layers[theirs].mlp.up_proj.weight)
    assert torch.equal(made.lm_head.weight, model.lm_head.weight)
    assert made.lm_head.weight is made.model.embed_tokens.weight  # as the model's are
    model.model.layers = torch.nn.ModuleList(model.model.layers[at] for at in (1, 3))
    model.config.num_hidden_layers = 2
    again = student_of(loaded(make_model(num_hidden_layers=5, initializer_range=0.2)), (1, 3), None, 0)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_what_a_configuration_says_of_each_layer_goes_with_it() -> None:
    model = family("Gemma-3")
    kinds = model.config.layer_types
    made = student_of(loaded(model), (1,), None, 0)
    assert made.config.layer_types == [kinds[1]]
    assert torch.isfinite(logits(made)).all()


def test_a_narrower_one_keeps_where_embeddings_vary_most() -> None:
    model = make_model(num_hidden_layers=3, initializer_range=0.2)
    made = student_of(loaded(model), 2, 16, 0)
    config = made.config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        16,
        2,
        1,
        8,
    )
    whole, narrow = model.model.embed_tokens.weight, made.model.embed_tokens.weight
    values = torch.linalg.svdvals(whole)
    assert float(narrow.square().sum()) == pytest.approx(float(values[:16].square().sum()), rel=1e-4)
    assert torch.isfinite(logits(made)).all()
    again = student_of(loaded(model), 2, 16, 0)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "sizes", "kept"),
    [
        ("DeepSeek-V3", {"first_k_dense_replace": 1}, (1, 3)),
        ("DeepSeek-V3", {"first_k_dense_replace": 2}, (0, 3)),
        ("DeepSeek-V3", {"first_k_dense_replace": 2}, 2),
        ("Qwen3-MoE", {"mlp_only_layers": [1]}, (1, 2)),
        ("Qwen3-MoE", {"decoder_sparse_step": 2}, (0, 3)),
        ("Mixtral", {}, (1, 3)),
    ],
)
def test_a_layer_of_a_mixture_is_of_its_own_kind(name: str, sizes: dict[str, Any], kept: Any) -> None:
    model = deep(name, num_hidden_layers=4, **sizes)
    made = student_of(loaded(model), kept, None, 0)
    whole = [model.model.layers[at] for at in ((0, 3) if kept == 2 else kept)]
    for ours, theirs in zip(made.model.layers, whole, strict=True):
        weights = dict(theirs.named_parameters())
        assert weights.keys() == dict(ours.named_parameters()).keys()
        assert all(torch.equal(weight, weights[name]) for name, weight in ours.named_parameters())
    assert torch.isfinite(logits(made)).all()


def test_layers_of_several_kinds_that_cannot_be_laid_so_are_refused() -> None:
    model = deep("DeepSeek-V3", num_hidden_layers=3, first_k_dense_replace=1)
    why = "drafter.layers: layer 2 of DeepseekV3ForCausalLM is of another kind .*; fix: keep layers of each kind in"
    with pytest.raises(ModelError, match=why):
        student_of(loaded(model), (2, 0), None, 0)


def test_what_cannot_be_made_is_refused() -> None:
    held = loaded(make_model())
    for kept, width, why in (
        (2, None, r"drafter.layers: 2 layers are not fewer than the 2 of the model; fix: give 1 to 1"),
        ((2,), None, r"drafter.layers: 2 is none of the 2 layers of the model; fix: give numbers from 0 to 1"),
        (1, 32, r"drafter.width: 32 is no width between 16 and 32"),
        (1, 17, r"drafter.width: 17 is odd"),
        (1, 2, r"drafter.width: 2 is no width between"),
    ):
        with pytest.raises(RecipeError, match=why):
            student_of(held, kept, width, 0)
    odd = family("BLOOM")
    odd.config.num_key_value_heads = None
    with pytest.raises(ModelError, match=r"drafter.width: a configuration of bloom has sizes that are not narrowed"):
        student_of(replace(loaded(odd), attention="own"), 1, 16, 0)
