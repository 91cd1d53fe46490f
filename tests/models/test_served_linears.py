"""What linears do is held from step to step: whatever changes it in between is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmkit_kernels.build import lacks
from torch import Tensor, nn
from torch.nn.utils import prune

from llmkit.adapters.lora import attach
from llmkit.adapters.method import Around
from llmkit.adapters.node import Lora
from llmkit.models import served_linears
from llmkit.models.decoder import Decoder
from llmkit.models.families import tiny
from llmkit.models.served_linears import Asked, ServedLora
from tests.models.test_served_attention import ready, stepped

pytestmark = pytest.mark.skipif(bool(lacks("linear") or lacks("paged")), reason=lacks("linear") or lacks("paged"))


@pytest.fixture
def made() -> Decoder:
    """A Llama with two LoRAs on it, of which the first is in use."""
    model: Any = attach(ready(tiny("Llama")), Lora(rank=4, alpha=8), Around())
    model.add_adapter("other", model.peft_config["default"])
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=drawn) * 0.3)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            dropped(module)  # all of it: what training does with it is not drawn
    return Decoder(model.eval())


def loras(made: Decoder) -> list[Any]:
    return [module for module in made.model.modules() if type(module.__dict__.get("forward")) is ServedLora]


class Halved:
    """Something else than a plain LoRA."""

    @staticmethod
    def forward(_: Any, result: Tensor, **__: Any) -> Tensor:
        """Half of it."""
        return result * 0.5


def dropped(one: Any) -> None:
    one.lora_dropout["default"] = nn.Dropout(1.0)


def ranked(one: Any) -> None:
    down, up = one.lora_A["default"].weight, one.lora_B["default"].weight
    down.data, up.data = torch.cat([down.data, down.data]), torch.cat([up.data, up.data], 1)


def shifted(part: Any) -> None:
    part.bias = nn.Parameter(torch.ones(part.weight.shape[0]))


def renewed(part: Any) -> None:
    part.weight = nn.Parameter(part.weight * 2)


def elsewhere(part: Any) -> None:
    part.weight.data = part.weight.data * 2


def turned(part: Any) -> None:
    part.weight.data = part.weight.data.T.contiguous().T * 2


def scaled(one: Any) -> None:
    one.scaling["default"] *= 2


def merged(one: Any) -> None:
    was = one.base_layer.weight.clone()
    one.merge()
    one.base_layer.weight.copy_(was)


def hooked(one: Any) -> None:
    one.register_forward_hook(lambda _, __, out: out * 2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another adapter": lambda one: one.set_adapter("other"),
    "both": lambda one: one.set_adapter(["default", "other"]),
    "none": lambda one: setattr(one, "_disable_adapters", True),
    "merged": merged,
    "a factor": scaled,
    "a variant": lambda one: one.lora_variant.update(default=Halved()),
    "training": lambda one: one.train(),
    "a bias behind up": lambda one: shifted(one.lora_B["default"]),
    "a bias": lambda one: shifted(one.base_layer),
    "a rank": ranked,
    "a base elsewhere": lambda one: elsewhere(one.base_layer),
    "a base the other way round": lambda one: turned(one.base_layer),
    "another base": lambda one: renewed(one.base_layer),
    "down elsewhere": lambda one: elsewhere(one.lora_A["default"]),
    "another down": lambda one: renewed(one.lora_A["default"]),
    "up elsewhere": lambda one: elsewhere(one.lora_B["default"]),
    "another up": lambda one: renewed(one.lora_B["default"]),
    "up in place": lambda one: one.lora_B["default"].weight.mul_(2),
    "a hook": hooked,
    "another forward": lambda one: setattr(one, "forward", one.base_layer.forward),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_between_two_steps_is_seen(made: Decoder, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    before, layer = stepped(made), made.causal.model.layers[1]
    with torch.no_grad():
        for one in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            CHANGES[kind](one)
    ours = stepped(made)
    monkeypatch.setattr(served_linears, "state", lambda _: None)  # as if nothing was ever held
    assert all(a.equal(b) for a, b in zip(ours, stepped(made), strict=True))
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(ours, before, strict=True))


def test_a_base_that_learns_and_autocast_are_seen(made: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped(made)
    asked, one = Asked(served_linears.ready), loras(made)[3]
    x = torch.randn(2, one.base_layer.weight.shape[1])
    held = asked.ready(x, [one])
    assert held is not None and asked.ready(x, [one]) is held
    assert asked.ready(x.double(), [one]) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert asked.ready(x, [one]) is None
        ours = stepped(made)
    assert asked.ready(x, [one]) is not None
    one.base_layer.weight.requires_grad_(True)
    assert asked.ready(x, [one]) is None
    one.base_layer.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no gradient"):
        asked.ready(x, [one]).many(x)
    monkeypatch.setattr(served_linears, "state", lambda _: None)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(a.equal(b) for a, b in zip(ours, stepped(made), strict=True))


def test_dropout_that_comes_while_training_is_seen(made: Decoder) -> None:
    one, asked = loras(made)[3], Asked(served_linears.ready)
    one.lora_dropout["default"] = nn.Identity()
    one.train()
    x = torch.randn(2, one.base_layer.weight.shape[1])
    assert asked.ready(x, [one]) is not None
    dropped(one)
    assert asked.ready(x, [one]) is None


@torch.no_grad()
def test_a_bias_that_is_read_as_a_copy_is_read_anew() -> None:
    plain = Decoder(ready(tiny("Llama"))).causal.model.layers[0].mlp.up_proj
    plain.bias = nn.Parameter(torch.zeros(2 * len(plain.weight))[::2])
    x = torch.randn(3, plain.weight.shape[1])
    before = plain(x)
    plain.bias.add_(1)
    assert plain(x).equal(before + 1)


def test_nothing_is_asked_twice(made: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stepped(made)
    monkeypatch.setattr(served_linears, "parts", lambda *_: pytest.fail("asked again"))
    assert all(a.equal(b) for a, b in zip(first, stepped(made), strict=True))


def test_a_full_fine_tune_is_seen() -> None:
    model = ready(tiny("Llama"))
    made = Decoder(model)
    before = stepped(made)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    ours = stepped(made)
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(ours, before, strict=True))
    assert all(a.equal(b) for a, b in zip(ours, stepped(Decoder(model)), strict=True))


def test_weights_that_are_made_anew_in_each_call_go_their_own_way() -> None:
    """Those of a pruned linear are no parameters of its own."""
    model = ready(tiny("Llama"))
    expected = stepped(Decoder(copy.deepcopy(model)))
    for layer in model.model.layers:
        for one in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            prune.identity(one, "weight")
    ours = stepped(Decoder(model))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, expected, strict=True))
