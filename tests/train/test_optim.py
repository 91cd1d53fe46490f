"""Optimizers as nodes: rates and decay by parameter, what states take, and GaLore and APOLLO by their formulas."""

import pytest
import torch
from torch import nn

from llmkit.core.errors import RecipeError
from llmkit.train.low_rank import GROWTH, LowRank
from llmkit.train.optim import AdamW, Apollo, Galore, Muon, ScheduleFree
from llmkit.train.optimizing import below, rated
from tests.parallel.test_steps import NODES, Tiny, stepped, stepper


def shapes(*names):
    return {name: nn.Parameter(torch.zeros((2,) if "norm" in name else (2, 3))) for name in names}


NAMES = shapes(
    "model.embed_tokens.weight",
    "model.layers.0.q_proj.weight",
    "model.layers.0.norm.weight",
    "model.layers.2.experts.5.w1.weight",
    "model.norm.weight",
    "lm_head.weight",
)


def rates(node, factors=None, params=NAMES):
    return {name: (g.lr, g.weight_decay) for g in rated(node, params, factors or {}) for name in g.params}


def test_the_rate_falls_by_layer_below_the_last_one():
    assert list(below(NAMES).values()) == [2, 2, 0, 3]  # layers 0, 0, 2, then the embeddings
    found = rates(AdamW(lr=1.0, layer_decay=0.5))
    assert [lr for lr, _ in found.values()] and found["model.layers.0.q_proj.weight"][0] == 0.25
    assert found["model.layers.2.experts.5.w1.weight"][0] == found["lm_head.weight"][0] == 1.0
    assert found["model.embed_tokens.weight"][0] == 0.125 and found["model.norm.weight"][0] == 1.0
    with pytest.raises(RecipeError, match=r"optim\.layer_decay: no trained parameter is in a numbered layer"):
        rates(AdamW(layer_decay=0.5), params=shapes("weight"))


def test_groups_name_rates_and_decays_and_the_last_one_counts():
    groups = [{"match": "*layers*", "lr": 5.0, "weight_decay": 0.5}, {"match": "*layers.0.*", "factor": 3.0}]
    found = rates(AdamW(lr=1.0, weight_decay=0.1, groups=groups), {"lm_head.weight": 16.0})
    assert found["model.layers.2.experts.5.w1.weight"] == (5.0, 0.5)
    assert found["model.layers.0.q_proj.weight"] == (3.0, 0.5)
    assert found["lm_head.weight"] == (16.0, 0.1) and found["model.norm.weight"] == (1.0, 0.0)
    both = {"match": "*", "lr": 1.0, "factor": 2.0}
    for bad, said in ((both, "both say what the rate is"), ({"match": "*"}, "the group changes nothing")):
        with pytest.raises(RecipeError, match=said):
            AdamW(groups=[bad])


def test_a_group_that_matches_nothing_names_near_names():
    with pytest.raises(RecipeError, match=r"optim\.groups\.0\.match: \*lm_haed\* matches none of 6.*lm_head\.weight"):
        rates(AdamW(groups=[{"match": "*lm_haed*", "factor": 2.0}]))


@pytest.mark.parametrize("name", NODES)
def test_decay_takes_matrices_alone_and_rates_are_those_of_the_groups(name):
    node = type(NODES[name])(**{**vars(NODES[name]), "weight_decay": 0.1})
    steps, before = stepper(node), {}
    for key, p in steps.params.items():
        torch.nn.init.normal_(p)
        before[key], p.grad = p.detach().clone(), torch.zeros_like(p)
    steps.step(0.5, 0.0, 0.0)
    for key, p in steps.params.items():
        if p.ndim > 1:
            assert float(p.norm()) < float(before[key].norm()), key
        else:
            assert torch.equal(p, before[key]), key
    assert {group["lr"] for _, group in steps.optimizer.groups} == {rate * 0.5 for rate in steps.optimizer.rates}


@pytest.mark.parametrize("name", NODES)
def test_it_learns(name):
    steps = stepper(NODES[name])
    batch = torch.arange(15).reshape(3, 5)
    from tests.parallel.test_steps import loss

    def now():
        with torch.no_grad(), steps.averaged():
            return float(loss(steps.scored(batch), batch).total)

    first = now()
    for _ in range(12):
        steps.accumulate([batch], loss, 15.0)
        steps.step(1.0, 1.0, steps.grad_norm())
    assert now() < first - 0.5


@pytest.mark.parametrize("name", NODES)
def test_a_state_takes_what_the_account_says(name):
    node = NODES[name]
    if isinstance(node, Galore | Apollo):
        node = type(node)(rank=16)
    steps = stepped(stepper(node), range(1))
    held = sum(v.numel() * v.element_size() for k, v in steps.state().items() if k.startswith("optim/"))
    held -= sum(v.numel() * 4 for k, v in steps.state().items() if "qmap" in k)  # one for all, saved for each
    outer = steps.params["embed_tokens.weight"].numel()
    inner = sum(p.numel() for p in steps.params.values()) - outer
    told = node.moments(inner, outer, 64)
    assert abs(told - held) <= 0.25 * held + 3000, (told, held)


def test_without_an_average_in_its_weights_schedule_free_is_refused():
    with pytest.raises(RecipeError, match=r"beta1: 0.*above 0"):
        ScheduleFree(beta1=0.0)
    assert AdamW(beta1=0.0).beta1 == 0.0


def test_muon_holds_matrices_of_layers_and_adamw_the_rest():
    muon, adamw = stepper(NODES["muon"]).optimizer.parts
    model = Tiny()
    assert [p.shape for g in muon.param_groups for p in g["params"]] == [(80, 64), (64, 80)]
    assert sum(len(g["params"]) for g in adamw.param_groups) == len(list(model.parameters())) - 2
    params = dict(nn.LayerNorm(4).named_parameters())
    assert len(Muon().build(params).parts) == 1


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
def test_galore_carries_adamws_step_back_from_the_leading_direction(shape):
    """A constant gradient u v' has one direction; AdamW's step in it is sign(v) and comes back as u sign(v)' / |u|."""
    u, v = torch.randn(shape[0]), torch.randn(shape[1])
    p = nn.Parameter(torch.zeros(shape))
    optimizer = LowRank([{"params": [p]}], 0.1, (0.9, 0.999), 0.0, 1, 2, 0.25, False)
    short, long = (u, v) if shape[0] < shape[1] else (v, u)
    step = torch.outer(short / short.norm(), long.sign())
    for count in range(1, 6):
        p.grad = torch.outer(u, v)
        optimizer.step()
        expected = -0.1 * 0.25 * count * (step if shape[0] < shape[1] else step.T)
        assert torch.allclose(p, expected, atol=1e-5)


def test_apollo_scales_channels_by_what_adamw_does_in_random_directions():
    torch.manual_seed(0)
    grads = [torch.randn(8, 20, dtype=torch.float64) for _ in range(3)]
    grads[2] *= 100
    p = nn.Parameter(torch.zeros(8, 20))
    optimizer = LowRank([{"params": [p]}], 0.1, (0.9, 0.99), 1e-8, 4, 100, 2.0, True)
    mean, square, last, seen = 0.0, 0.0, None, p.detach().double().clone()
    for count, grad in enumerate(grads, 1):
        p.grad = grad.float()
        optimizer.step()
        low = optimizer.state[p]["projection"].double() @ grad
        mean, square = 0.9 * mean + 0.1 * low, 0.99 * square + 0.01 * low**2
        step = (mean / (1 - 0.9**count)) / ((square / (1 - 0.99**count)).sqrt() + 1e-8)
        update = grad * (step.norm(dim=0) / low.norm(dim=0))
        norm = update.norm() if last is None else min(update.norm(), GROWTH * last)
        update, last = update * (norm / update.norm()), norm
        seen -= 0.1 * 2.0 * update
        assert torch.allclose(p.double(), seen, rtol=1e-4, atol=1e-6)
    assert optimizer.state[p]["projection"].shape == (4, 8)


def test_projections_depend_on_the_turn_alone():
    p = [nn.Parameter(torch.zeros(8, 20)) for _ in range(2)]
    optimizer = LowRank([{"params": p}], 0.1, (0.9, 0.99), 1e-8, 4, 2, 1.0, True)
    drawn = []
    for _ in range(3):
        for one in p:
            one.grad = torch.randn(8, 20)
        optimizer.step()
        drawn.append(optimizer.state[p[0]]["projection"])
    assert drawn[0] is drawn[1] and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(optimizer.state[p[1]]["projection"], drawn[2])
