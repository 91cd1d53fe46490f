"""The table of support says what is measured now, and its measures see what they are there to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from llmkit.build import support_files, support_lora
from llmkit.build.support import main, measure
from llmkit.build.support_files import exported, over_nf4, stretched, write
from llmkit.build.support_lora import adapted
from llmkit.models import support
from llmkit.models.families import FAMILIES
from llmkit.models.support import measured

QUICK = (
    *(
        "Llama",
        "Qwen2",
        "Qwen3",
        "Gemma-2",
        "Gemma-3",
        "Mistral",
        "Phi-3",
        "Phi-3, RoPE longrope",
        "gpt-oss",
        "Mixtral",
    ),
    *("Qwen3-MoE", "DeepSeek-V3", "OLMo-2", "SmolLM3", "Granite", "Cohere-2", "Qwen3-Next", "Granite-hybrid"),
    *("Falcon-H1", "Llama-4", "Falcon", "GPT-J", "BLOOM", "StableLM", "GPT-2", "Phi-3.5-MoE", "Jamba", "Mamba"),
    *("Gemma-4", "HunYuan"),
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_row_of_the_table_is_current(family: str) -> None:
    assert measure(family) == measured()[family], f"run `python -m llmkit.build.support '{family}'` and `make docs`"


def test_some_families_can_be_measured_again_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = support.DATA.read_text()
    held = tmp_path / "support.json"
    held.write_text(before.replace('"RoPE": "gpt2 has no RoPE that could be scaled"', '"RoPE": "yes"'))
    assert held.read_text() != before
    monkeypatch.setattr("llmkit.build.support.DATA", held)
    main(["GPT-2"])
    assert held.read_text() == before


def test_a_family_that_there_is_not_is_refused() -> None:
    from llmkit.core.errors import RecipeError

    with pytest.raises(RecipeError, match="Lama is no family of the table; fix: did you mean Llama"):
        main(["Lama"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    return write("Llama", tmp_path_factory.mktemp("llama") / "base")


def test_an_adapter_that_the_model_passes_by_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.adapters.select.unread", lambda model: set())
    assert adapted("Jamba", False)[0] == "JambaForCausalLM passes the adapter of model.layers.0.mamba.dt_proj by"


def test_gradients_that_are_not_the_chain_rules_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = support_lora.through

    def doubled(model: Any) -> Any:
        made = kept(model)
        for parameter in model.parameters():
            if parameter.grad is not None and parameter.shape[0] == 2:  # the first factors
                parameter.grad *= 1.001
        return made

    monkeypatch.setattr(support_lora, "through", doubled)
    learns, folded = adapted("Llama", False)
    assert learns == "LlamaForCausalLM: gradients of LoRA are off by 1e-03" and folded == "yes"


def test_a_merge_that_gives_another_model_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = peft.LoraModel.merge_and_unload

    def careless(self: Any, *args: Any, **more: Any) -> Any:
        whole = kept(self, *args, **more)
        with torch.no_grad():
            whole.model.layers[1].self_attn.v_proj.weight[0, 0] += 1e-6
        return whole

    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", careless)
    assert "LlamaForCausalLM is off by" in adapted("Llama", False)[1]


def test_a_base_that_moves_and_weights_that_are_not_the_quantised_ones_are_seen(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(support_files, "_dequantised", lambda held, plain: 1)
        assert "over NF4 is off from its dequantised weights" in over_nf4(llama, True)
    kept = torch.optim.AdamW.step

    def careless(self: Any, *args: Any) -> None:
        kept(self, *args)
        held[0].data[0] ^= 1

    held: list[Any] = []
    real = support_files.opened

    def opened(folder: Path, *args: Any, **more: Any) -> Any:
        made = real(folder, *args, **more)
        held.extend(p for p in made.model.parameters() if p.dtype == torch.uint8)
        return made

    monkeypatch.setattr(support_files, "opened", opened)
    monkeypatch.setattr(torch.optim.AdamW, "step", careless)
    assert over_nf4(llama, True) == "LlamaForCausalLM: a step changes the quantised base"


def test_another_scaling_is_seen(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support_files.SCALED, "factor", 3.0)
    assert "under RoPE `linear` is off by" in stretched(llama)


def test_a_model_that_is_not_scaled_is_seen(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = support_files._by_hand
    monkeypatch.setattr(support_files, "_by_hand", lambda folder, node=None: real(folder))
    monkeypatch.setattr(support_files, "opened", lambda folder, rope: _Held(real(folder)))
    assert stretched(llama) == "LlamaForCausalLM is not changed by RoPE `linear`"


class _Held:
    def __init__(self, model: Any) -> None:
        self.model = model


def test_a_weight_that_is_written_wrong_is_seen(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = support_files.export

    def careless(model: Any, *args: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-6
        kept(model, *args)

    monkeypatch.setattr(support_files, "export", careless)
    assert exported(llama) == "LlamaForCausalLM comes back with another model.norm.weight"
