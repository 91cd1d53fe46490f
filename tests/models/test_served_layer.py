"""A layer in one call: where it is taken, that it moves no bit, and that whatever changes a part of it is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmkit_kernels.layer import Layer, lacks
from torch import Tensor, nn

from llmkit.adapters.lora import attach
from llmkit.adapters.method import Around
from llmkit.adapters.node import Lora
from llmkit.core.types import Paged, Span
from llmkit.models import served_layer
from llmkit.models.decoder import Decoder
from llmkit.models.families import tiny
from llmkit.models.paged import BlockStore
from llmkit.models.served_layer import ServedLayer
from tests.conftest import make_model
from tests.models.test_served_attention import ready, stepped

pytestmark = pytest.mark.skipif(bool(lacks()), reason=lacks())
WHOLE = ("Llama", "Qwen2", "Qwen3", "Mistral")
OWN = ("Gemma-2", "Granite", "Mixtral", "Phi-3", "OLMo-2", "Cohere", "DeepSeek-V3")


def joined(made: Decoder) -> list[Any]:
    return [module for module in made.model.modules() if isinstance(module.__dict__.get("forward"), ServedLayer)]


def taken_apart(made: Decoder) -> Decoder:
    for module in joined(made):
        del module.forward
    return made


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call."""
    calls, run = list[int](), Layer.run
    monkeypatch.setattr(Layer, "run", lambda self, x, *more: (calls.append(len(x)), run(self, x, *more))[1])
    return calls


@pytest.mark.parametrize("family", WHOLE)
def test_it_moves_no_bit(family: str, runs: list[int]) -> None:
    made, count = Decoder(ready(tiny(family))), 2
    assert len(joined(made)) == count and runs == [5] * count  # they were tried
    ours = [stepped(made, dtype) for dtype in (None, torch.int8, torch.bfloat16)]
    assert runs[count:] == [9] * count * 2  # not with a layer's first keys, nor with keys of 16 bits
    taken_apart(made)
    for before, dtype in zip(ours, (None, torch.int8, torch.bfloat16), strict=True):
        assert all(a.equal(b) for a, b in zip(before, stepped(made, dtype), strict=True))


@pytest.mark.parametrize("family", OWN)
def test_a_layer_that_does_something_else_goes_its_own_way(family: str) -> None:
    assert not joined(Decoder(ready(tiny(family))))


@pytest.mark.parametrize("rank", [0, 4])
def test_rows_lanes_threads_and_trees_move_no_bit(rank: int, runs: list[int]) -> None:
    sizes = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1}
    model = ready(make_model(**sizes, head_dim=12))
    made = Decoder(attach(model, Lora(rank=rank, alpha=8), Around()).eval() if rank else model)
    for name, weight in made.model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))

    @torch.no_grad()
    def steps() -> list[Tensor]:
        store, outs = BlockStore(40, 16), []
        for count, past, parents in (
            (4, 0, ()),
            (1, 4, ()),
            (7, 5, (-1, 0, 0, 1, -1, 4, 2)),
            (40, 5, ()),
            (300, 45, ()),
        ):
            tokens = torch.arange(count) % 50 + 3
            places = torch.arange(past, past + count)
            span = Span(0, 0, count, past, tuple(range(40)), parents)
            outs.append(made.hidden(tokens, places, Paged(store, (span,)), [""]))
        return outs

    before, all_ = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            all_.append(steps())
    finally:
        torch.set_num_threads(before)
    layers = len(joined(made))
    assert layers and runs[layers:] == [row for row in (1, 7, 40) for _ in range(layers)] + [
        row for _ in range(2) for row in (1, 7, 40) for _ in range(layers)
    ]
    taken_apart(made)
    for ours in all_:
        assert all(a.equal(b) for a, b in zip(ours, steps(), strict=True))


def turned_norm(layer: Any) -> None:
    layer.input_layernorm.weight.data = layer.input_layernorm.weight * 2


def other_norm(layer: Any) -> None:
    layer.post_attention_layernorm = nn.LayerNorm(layer.mlp.up_proj.weight.shape[1])


def hung(name: str) -> Callable[[Any], Any]:
    def change(layer: Any) -> None:
        def more(_: Any, __: Any, out: Any) -> Any:
            return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

        layer.get_submodule(name).register_forward_hook(more)

    return change


def before(name: str) -> Callable[[Any], Any]:
    def change(layer: Any) -> None:
        layer.get_submodule(name).register_forward_pre_hook(lambda _, args: (args[0] * 2,))

    return change


def forwarded(name: str) -> Callable[[Any], Any]:
    def change(layer: Any) -> None:
        one = layer.get_submodule(name)
        was = one.forward
        one.forward = lambda *args, **kwargs: was(*args, **kwargs) * 2

    return change


def unattended(layer: Any) -> None:
    was = layer.self_attn.forward
    layer.self_attn.forward = lambda **kwargs: (was(**kwargs)[0] * 2, None)


def otherwise(layer: Any) -> None:
    layer.mlp = nn.Sequential(layer.mlp, nn.Tanh())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a norm elsewhere": turned_norm,
    "a norm in place": lambda layer: layer.post_attention_layernorm.weight.data.mul_(2),
    "another norm": other_norm,
    "its epsilon": lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 1.0),
    "a norm of keys": lambda layer: setattr(layer.self_attn.k_norm, "variance_epsilon", 1.0),
    **{f"a hook on {name}": hung(name) for name in ("self_attn", "mlp", "input_layernorm", "mlp.up_proj")},
    **{f"a hook before {name}": before(name) for name in ("mlp.gate_proj", "self_attn.o_proj")},
    "a hook on the layer": lambda layer: layer.register_forward_hook(lambda _, __, out: out + 1),
    **{f"forward of {name}": forwarded(name) for name in ("mlp", "post_attention_layernorm", "mlp.down_proj")},
    "forward of attention": unattended,
    "another mlp": otherwise,
    "another linear": lambda layer: setattr(layer.mlp, "down_proj", nn.Linear(*layer.mlp.down_proj.weight.shape[::-1])),
    "a weight elsewhere": lambda layer: setattr(layer.mlp.up_proj.weight, "data", layer.mlp.up_proj.weight.data * 2),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_between_two_steps_is_seen(kind: str) -> None:
    made = Decoder(ready(tiny("Qwen3")))
    before, layer = stepped(made), joined(made)[1]
    CHANGES[kind](layer)
    ours = stepped(made)
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(ours, before, strict=True))
    assert all(a.equal(b) for a, b in zip(ours, stepped(taken_apart(made)), strict=True))


def test_a_layer_in_training_or_with_a_gradient_goes_its_own_way(runs: list[int]) -> None:
    made = Decoder(ready(tiny("Llama")))
    layer = joined(made)[1]
    stepped(made)
    layer.training, count = True, len(runs)
    stepped(made)
    assert len(runs) == count + 1  # the other layer's
    x = torch.randn(1, 2, 64)
    assert not served_layer._few(x) and not served_layer._few(x.double())
    with torch.no_grad():
        assert served_layer._few(x) and not served_layer._few(x[0]) and not served_layer._few(x.transpose(0, 1))


def test_what_does_not_go_together_is_refused() -> None:
    made = Decoder(ready(tiny("Llama")))
    stepped(made)
    known = joined(made)[0].forward.asked.known
    layer, rule = known[1], known[1].rule
    with pytest.raises(ValueError, match="are no layer of"):
        Layer(*layer.kept[:4], layer.kept[4], rule._replace(heads=rule.heads + rule.held))
    with pytest.raises(ValueError, match="norms are not over"):
        Layer(*layer.kept[:4], [*layer.kept[4][:2], layer.kept[4][0], None], rule)
    store, x, turn = BlockStore(1, 4), torch.randn(2, layer.width), (torch.ones(2, rule.size), torch.ones(2, rule.size))
    laid = Paged(store, (Span(0, 0, 2, 0, (0,)),)).laid
    held = store.held(0, torch.zeros(rule.held, 2, rule.size), torch.zeros(rule.held, 2, rule.size))
    layer.run(x, held, laid, turn)
    for given, match in (
        ((x[:, 1:], held, laid, turn), "do not go with"),
        ((x, held, laid, (turn[0][:1], turn[1])), "do not go with"),
        ((x.double(), held, laid, turn), "not fp32"),
        ((torch.cat([x, x]), held, laid, [torch.cat([one, one]) for one in turn]), "do not go into blocks"),
    ):
        with pytest.raises(ValueError, match=match):
            layer.run(*given)


@torch.no_grad()
def test_rows_past_the_last_span_go_their_own_way(runs: list[int]) -> None:
    made = Decoder(ready(tiny("Llama")))
    store, tried = BlockStore(4, 8), len(runs)
    for past in (0, 2):
        attend = Paged(store, (Span(0, 0, 2, past, (0, 1, 2, 3)),))
        outs = made.hidden(torch.tensor([5, 6, 7]), torch.tensor([past, past + 1, 0]), attend, [""])
    assert len(outs) == 3 and len(runs) == tried
