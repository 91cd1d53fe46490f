"""Linears of one input as one operation: each as it is alone, in any order, asked for or not."""

import pytest
import torch
from llmkit_kernels.build import lacks

from llmkit.adapters import together
from llmkit.adapters.node import Lora
from llmkit.adapters.together import Part, Together, lora_linears
from tests.conftest import make_model


def part(out, size=6, rank=2, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed + out)
    down, up = torch.randn(rank, size, generator=g), torch.randn(out, rank, generator=g)
    shift = torch.randn(out, generator=g) if bias else None
    return Part(torch.randn(out, size, generator=g), shift, down.requires_grad_(), up.requires_grad_(), 0.5)


def plain(x, p):
    return torch.nn.functional.linear(x, p.weight, p.bias) + p.scale * (x @ p.down.T) @ p.up.T


class Fixed:
    """A member whose part is given."""

    def __init__(self, p):
        self.held = p

    def part(self, x):
        return self.held


PARTS = [part(5), part(3, rank=4, bias=True), part(5, seed=9)]


@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (2, 0)])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 7, 6), (0, 6)], ids=str)
def test_values_and_gradients_are_those_of_each_alone(used, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    leaves = [x, *[t for i in used for t in (PARTS[i].down, PARTS[i].up)]]
    outs = lora_linears(x, PARTS)
    ours = torch.autograd.grad(sum(outs[i].square().sum() for i in used), leaves)
    theirs = torch.autograd.grad(sum(plain(x, PARTS[i]).square().sum() for i in used), leaves)
    for i, out in enumerate(outs):
        torch.testing.assert_close(out, plain(x, PARTS[i]), rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_an_output_may_be_changed_in_place():
    x = torch.randn(4, 6, requires_grad=True)
    out, other, _ = lora_linears(x, PARTS)
    out.mul_(2)
    grad = torch.autograd.grad(out.sum() + other.sum(), x)[0]
    want = torch.autograd.grad(2 * plain(x, PARTS[0]).sum() + plain(x, PARTS[1]).sum(), x)[0]
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


def test_one_input_is_computed_once_and_nothing_of_it_stays():
    members = [Fixed(p) for p in PARTS]
    group, x = Together(members), torch.randn(4, 6)
    first = group.output(members[1], x)
    waiting = dict(group.made)
    assert group.output(members[0], x) is waiting[id(members[0])]
    group.output(members[2], x)
    assert group.made == {} and group.key == ()
    torch.testing.assert_close(first, plain(x, PARTS[1]))


def test_another_input_a_change_in_place_or_another_mode_is_computed_anew():
    members = [Fixed(p) for p in PARTS]
    group, x = Together(members), torch.randn(4, 6)
    group.output(members[0], x)
    y = torch.randn(4, 6)
    torch.testing.assert_close(group.output(members[1], y), plain(y, PARTS[1]))  # x's others were never asked for
    y.mul_(3)
    torch.testing.assert_close(group.output(members[2], y), plain(y, PARTS[2]))
    with torch.no_grad():
        assert not group.output(members[0], y).requires_grad
    assert group.output(members[0], y).requires_grad
    again = group.output(members[0], y)  # asked for twice
    torch.testing.assert_close(again, plain(y, PARTS[0]))


def test_a_model_whose_members_differ_takes_pefts_way_where_it_must():
    def loss(model):
        return model(input_ids=torch.arange(3, 30)[None], use_cache=False).logits.square().mean()

    model = Lora(rank=2).attach(make_model())
    layer = model.base_model.model.model.layers[0].self_attn
    assert layer.q_proj.together is layer.v_proj.together is not None and layer.o_proj.together is None
    torch.nn.init.normal_(layer.k_proj.lora_B["default"].weight)
    want = loss(model)
    layer.k_proj.lora_dropout["default"] = torch.nn.Dropout(0.0)  # k alone is peft's now
    model.train()
    torch.testing.assert_close(loss(model), want, rtol=1e-5, atol=1e-7)


def test_few_rows_without_a_gradient_are_the_same_in_one_call(monkeypatch):
    torch.manual_seed(0)
    parts = [
        together.Part(torch.randn(out, 32), bias, torch.randn(4, 32), torch.randn(out, 4), 0.5)
        for out, bias in ((48, torch.randn(48)), (16, None))
    ]
    x, calls, true = torch.randn(1, 5, 32), [], together.many
    monkeypatch.setattr(together, "many", lambda *given: calls.append(1) or true(*given))
    with torch.no_grad():
        few = together.lora_linears(x, parts)
    assert calls == ([] if lacks("linear") else [1])
    many = together.lora_linears(x, parts)
    for part, a, b in zip(parts, few, many, strict=True):
        want = x @ (part.weight + part.scale * part.up @ part.down).T + (0 if part.bias is None else part.bias)
        assert a.shape == b.shape == want.shape
        assert torch.allclose(a, want, rtol=1e-5, atol=1e-4) and torch.allclose(b, want, rtol=1e-5, atol=1e-4)
