"""A reference by adapter off is the model as it was, and leaves the policy as it is."""

import pytest
import torch

from llmkit.adapters.bottleneck import Bottleneck
from llmkit.adapters.method import Around
from llmkit.adapters.node import Lora
from llmkit.adapters.rotations import Oft
from llmkit.adapters.scaled import Ia3, Vera
from llmkit.core.types import Needs
from llmkit.models.attend import install
from llmkit.models.heads import Scored
from llmkit.models.referred import Referred
from tests.conftest import make_model, make_tokenizer
from tests.models.test_shared_prompts import drawn, laid

METHODS = {
    "lora": Lora(rank=4, dropout=0.3),
    "dora": Lora(rank=4, dora=True),
    "lora_fa": Lora(rank=4, lora_fa=True),
    "pissa": Lora(rank=4, init="pissa"),
    "tokens": Lora(rank=4, targets=("q_proj", "v_proj"), trainable_tokens=("a", "b")),
    "whole modules": Lora(rank=4, targets=("q_proj", "v_proj"), modules_to_save=("norm",)),
    "ia3": Ia3(),
    "vera": Vera(rank=8),
    "oft": Oft(block_size=16),
    "bottleneck": Bottleneck(size=4),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_reference_is_the_model_below_its_adapter(name):
    base = make_model()
    install(base, "auto")
    (batch,) = laid(drawn(2, 3), True)
    with torch.no_grad():
        before = Scored(base).eval()(batch)
    model = METHODS[name].attach(base, Around(tokenizer=make_tokenizer()))
    torch.manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter.data, 0.0, 0.2)
    scored = Referred(Scored(model)).train()
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    said = scored(batch, Needs(by_weight=False))
    torch.testing.assert_close(said.reference, before, atol=2e-5, rtol=1e-5)
    assert (said.policy - said.reference).abs().max() > 1e-3 and not said.reference.requires_grad
    assert flags == {key: p.requires_grad for key, p in model.named_parameters()}
    assert all(module.training for module in model.modules())
    said.policy.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_noise_on_embeddings_is_the_policys_alone():
    base = make_model()
    install(base, "auto")
    (batch,) = laid(drawn(2, 3), True)
    with torch.no_grad():
        before = Scored(base).eval()(batch)
    scored = Referred(Scored(Lora(rank=4).attach(base, Around()))).train()
    scored.disturb(5.0)
    said = scored(batch)
    torch.testing.assert_close(said.reference, before, atol=2e-5, rtol=1e-5)
    assert (said.policy - before).abs().max() > 1e-3 and scored.training


def test_a_second_model_stays_as_it_is():
    policy, other = make_model(), make_model(seed=1)
    for model in (policy, other):
        install(model, "auto")
    other.requires_grad_(False)
    (batch,) = laid(drawn(2, 2), True)
    scored = Referred(Scored(policy), Scored(other).eval()).train()
    said = scored(batch)
    torch.testing.assert_close(said.reference, Scored(other).eval()(batch), atol=0, rtol=0)
    assert {key for key, _ in scored.named_parameters()} == {key for key, _ in Scored(policy).named_parameters()}
    assert not any(module.training for module in other.modules())


def test_without_an_adapter_there_is_nothing_below():
    model = make_model()
    install(model, "auto")
    (batch,) = laid(drawn(2, 1), True)
    with pytest.raises(ValueError, match="nothing below it"):
        Referred(Scored(model))(batch)
