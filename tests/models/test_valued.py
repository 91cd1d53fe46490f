"""A critic beside its policy: what it shares, where it reads, and that a prompt once for its answers is the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llmkit.adapters.node import Lora
from llmkit.core.types import Needs
from llmkit.data.batches import micro_batches
from llmkit.data.node import FirstFit
from llmkit.models.attend import install
from llmkit.models.compare import Doubled, exact
from llmkit.models.families import tiny
from llmkit.models.heads import Scored
from llmkit.models.valued import Critic, Criticised, ValueHead, twin
from tests.models.test_shared_prompts import drawn


def criticised(family, own, dtype=torch.float64):
    model = exact(tiny(family, 0.05)) if dtype == torch.float64 else tiny(family, 0.05)
    install(model, "auto")
    torch.manual_seed(3)
    policy = Lora(rank=4).attach(model).to(dtype)
    _spread(policy)
    width = model.config.get_text_config().hidden_size
    trunk = None
    if own:
        trunk = Lora(rank=2).attach(twin(policy)).to(dtype)
        _spread(trunk)
    head = ValueHead(torch.randn(1, width, dtype=dtype, generator=torch.Generator().manual_seed(7)))
    return Criticised(Scored(policy), Critic(head, trunk))


def _spread(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)


def values(scored, groups, trees):
    batches = micro_batches(groups, range(len(groups)), FirstFit(), 4096, 64, True, "cpu", trees=trees)
    found = torch.zeros(len(groups.ids), dtype=torch.float64)
    for batch in batches:
        hidden = scored.hidden(batch)
        said = scored.critic(batch, hidden)
        found = found.index_add(0, batch.branches.each["place"].long(), said)
    return found


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Gemma-2"])
def test_values_of_prompts_once_are_those_of_a_prompt_each(family, own):
    groups = drawn(4, 3)
    groups = replace(groups, each={"place": np.arange(len(groups.ids))})
    scored, made = criticised(family, own), []
    factors = torch.randn(len(groups.ids), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for trees in (True, False):
        scored.zero_grad()
        with Doubled():
            said = values(scored, groups, trees)
            (said * factors).sum().backward()
        made.append(
            (said.detach(), {name: p.grad.clone() for name, p in scored.named_parameters() if p.grad is not None})
        )
    (tree, slopes), (alone, own_slopes) = made
    assert float((tree - alone).abs().max()) <= 1e-10 * float(alone.abs().max())
    assert slopes.keys() == own_slopes.keys()
    for name, slope in slopes.items():
        assert float((slope - own_slopes[name]).abs().max()) <= 1e-10 * float(own_slopes[name].abs().max()), name


def test_a_value_is_of_the_state_before_its_token():
    groups = drawn(1, 1, most=9)
    groups = replace(groups, each={"place": np.arange(len(groups.ids))}, weights=np.ones_like(groups.weights))
    groups.weights[: groups.forks[0]] = 0
    scored = criticised("Llama", False)
    before = values(scored, groups, False).detach()
    last = replace(groups, ids=groups.ids.copy())
    last.ids[-1] = 3 if groups.ids[-1] != 3 else 4
    assert torch.equal(values(scored, last, False).detach(), before)
    first = replace(groups, ids=groups.ids.copy())
    first.ids[groups.forks[0] - 1] = 3 if groups.ids[groups.forks[0] - 1] != 3 else 4
    assert not torch.equal(values(scored, first, False).detach()[groups.forks[0]], before[groups.forks[0]])


def test_a_twin_shares_the_weights_and_nothing_that_is_trained():
    scored = criticised("Llama", True, torch.float32)
    base = {id(p) for name, p in scored.model.named_parameters() if "lora" not in name}
    trunk = dict(scored.critic.own.model.named_parameters())
    assert {id(p) for name, p in trunk.items() if "lora" not in name} == base
    mine = {id(p) for name, p in scored.model.named_parameters() if "lora" in name}
    assert not mine & {id(p) for p in trunk.values()}
    groups = drawn(2, 1)
    (batch,) = micro_batches(groups, range(1), FirstFit(), 4096, 64, True, "cpu", trees=True)
    plain = scored(batch, Needs(by_weight=False)).detach()
    with torch.no_grad():
        for name, p in trunk.items():
            if "lora" in name:
                p.zero_()
    assert torch.equal(scored(batch, Needs(by_weight=False)), plain)
