"""What a run of `kind: draft` is said to take: what is trained beside a model, and never that all of it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmkit import Draft
from llmkit.build.student import student_of
from llmkit.core.shape import Cost, Shape
from llmkit.models.draft_head import DraftHead, shape_for
from llmkit.models.load import Loaded
from llmkit.models.outline import stored
from llmkit.models.probe import Support
from llmkit.models.resolve import Resolved
from llmkit.plan.account import account
from llmkit.stages.holding import held_by
from llmkit.stages.sizes import chosen
from tests.conftest import make_model

GIB = 1 << 30


def node(drafter: dict[str, Any]) -> Draft:
    source = {"kind": "jsonl", "path": "rows.jsonl"}
    return Draft(model="m", drafter=drafter, data={"train": [source], "max_length": 512}, out="o", steps=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Shape]:
    folder: Path = tmp_path_factory.mktemp("model")
    model = make_model(num_hidden_layers=4)
    model.save_pretrained(folder)
    return model, stored(folder)


def test_a_head_takes_what_it_has(saved: tuple[Any, Shape]) -> None:
    model, shape = saved
    head = DraftHead(shape_for(model, 40, (1, 2, 4)), model.get_input_embeddings())
    real = sum(p.numel() for p in head.parameters())
    assert node({"kind": "head", "vocabulary": 40, "taps": [1, 2, 4]}).cost(shape).trained == pytest.approx(
        real, rel=0.03
    )


@pytest.mark.parametrize("layers", [2, [0, 1, 3]])
def test_a_small_model_takes_what_it_has(layers: Any, saved: tuple[Any, Shape]) -> None:
    model, shape = saved
    loaded = Loaded(model, None, "sdpa", Support(True, True, True), Resolved("m", Path(), "", "", ""))
    real = sum(p.numel() for p in student_of(loaded, layers, None, 0).parameters())
    assert node({"kind": "distilled", "layers": layers}).cost(shape).trained == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize(
    ("drafter", "layers"),
    [({"kind": "head", "depth": 3, "vocabulary": 40}, 3), ({"kind": "distilled", "layers": [0, 2]}, 2)],
    ids=["head", "distilled"],
)
def test_only_what_gradients_pass_through_is_kept(
    drafter: dict[str, Any], layers: int, saved: tuple[Any, Shape]
) -> None:
    """Layers of the frozen model keep nothing: twice as many of them take no more."""
    shape, stage = saved[1], node(drafter)
    held = held_by(stage, shape, "cpu")
    kept, whole = (account(shape, one, 1000).activations for one in (held, replace(held, cost=Cost(1))))
    beside = 4 * 1000 * held.cost.beside
    assert kept - beside - 8000 * shape.hidden == pytest.approx((whole - 8000 * shape.hidden) * layers / shape.layers)
    assert (beside > 4 * 1000 * 40) == (drafter["kind"] == "head"), "hidden states and laws that wait for the backward"


@pytest.mark.parametrize("drafter", [{"kind": "head"}, {"kind": "distilled", "layers": 2}])
def test_a_model_that_could_not_be_trained_whole_can_be_drafted_for(drafter: dict[str, Any]) -> None:
    """Llama's 8B on a device of 96 GiB, where whole training takes 139 GiB."""
    wide, inner, keys = 4096, 14336, 1024
    layer = {"q": [wide, wide], "o": [wide, wide], "k": [keys, wide], "v": [keys, wide], "down": [wide, inner]}
    layer |= {"gate": [inner, wide], "up": [inner, wide]}
    tensors = {f"model.layers.{at}.{name}.weight": size for at in range(32) for name, size in layer.items()}
    tensors |= {"model.embed_tokens.weight": [128256, wide], "lm_head.weight": [128256, wide]}
    sizes = {"hidden_size": wide, "num_hidden_layers": 32, "intermediate_size": inner, "vocab_size": 128256}
    shape = Shape.read(sizes | {"num_attention_heads": 32, "num_key_value_heads": 8}, tensors)
    for device in ("cpu", "cuda"):
        made = chosen(node(drafter), shape, device, 96 * GIB, 1)
        assert made.fits, made.account.parts
        assert made.account.parts["weights"] > 4 * shape.params  # it is there all the same
