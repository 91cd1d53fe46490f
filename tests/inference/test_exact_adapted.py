"""Models that are adapters of peft: a request beside others is to the bit what it is alone, or that is said by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model

from llmkit.core.errors import ModelError
from llmkit.models.attend import install
from llmkit.models.decoder import Decoder
from llmkit.models.families import tiny
from llmkit.models.ordered import row
from llmkit.models.serving import lacks_order
from tests.inference.exact import Trial, some

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HOLDS = {
    "lora with a bias": LoraConfig(r=4, bias="lora_only", target_modules=ALL),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=ALL),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
SAID = {
    "vera": VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=ALL),
    "boft": BOFTConfig(boft_block_size=4, target_modules=["q_proj", "o_proj"]),
    "loha": LoHaConfig(r=4, target_modules=ALL),
    "lokr": LoKrConfig(r=4, target_modules=ALL),
}


def adapted(config: Any) -> Any:
    base = tiny("Llama").eval()
    install(base, "auto")
    return moved(get_peft_model(base, config))


def moved(model: Any) -> Any:
    """With weights that do something."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.2
    return model.eval()


def bottlenecks() -> Any:
    from llmkit.adapters.bottleneck import Bottleneck
    from llmkit.adapters.method import Around

    base = tiny("Llama").eval()
    install(base, "auto")
    return moved(Bottleneck(size=4).attach(base, Around(stored=None)))


@pytest.mark.skipif(not row(), reason="nothing is compiled here")
@pytest.mark.parametrize("name", [*HOLDS, "bottleneck"])
def test_a_request_of_an_adapted_model_is_alone_to_the_bit(name: str) -> None:
    model = bottlenecks() if name == "bottleneck" else adapted(HOLDS[name])
    trial = Trial(model)
    assert trial.decoder.exact
    requests = some(trial.words, 1, 8, 24, 6)
    seen = [trial.check(seed, requests) for seed in range(3)]
    assert sum(one.compared for one in seen) > 50 and max(one.together for one in seen) > 1


@pytest.mark.parametrize("name", SAID)
def test_products_of_their_own_are_said_by_name_and_refused_where_exactness_is_asked(name: str) -> None:
    model = adapted(SAID[name])
    assert f"its adapter is a {name}" in lacks_order(model)
    assert not Decoder(model).exact
    with pytest.raises(ModelError, match=f"exact: cannot be run exactly: its adapter is a {name}"):
        Decoder(model, exact=True)


def test_a_lora_of_parameters_is_said_too() -> None:
    from types import SimpleNamespace

    held = SimpleNamespace(peft_type="LORA", target_parameters=["experts.gate_up_proj"])
    assert "uses target_parameters" in lacks_order(SimpleNamespace(peft_config={"default": held}))
