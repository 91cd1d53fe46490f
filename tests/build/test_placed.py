"""A model whose layers lie on a disk until their turn says what it says in memory, with its adapters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from llmkit.build.placed import check_placement, place
from llmkit.core.errors import ModelError, RecipeError
from llmkit.models.node import Nf4
from tests.models.test_loras import decoder, drawn, saved, stepped

SIZES = {"cpu": 40_000, "disk": 10_000_000}


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Gemma-2"])
def test_layers_on_a_disk_say_what_they_say_in_memory(family, tmp_path):
    folder = saved(tmp_path / "lora", LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), family)
    rows = [("", drawn(7)[0]), ("lora", drawn(5)[0])]
    here, there = decoder(family), decoder(family)
    places = place(there, SIZES)
    assert {"cpu", "disk"} == set(places.values())
    away = [name for name, weight in there.causal.named_parameters() if weight.is_meta]
    assert any(".layers." in name for name in away)  # the control: they are not in memory
    for made in (here, there):
        made.bank.put("lora", made.bank.read(folder))
    for one, other in zip(stepped(here, rows), stepped(there, rows), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(here.logits(one), there.logits(other))
    assert [name for name, weight in there.causal.named_parameters() if weight.is_meta] == away


def test_all_of_a_model_may_lie_on_a_disk():
    made = decoder()
    assert set(place(made, {"cpu": 1, "disk": 10_000_000}).values()) == {"disk"}
    assert all(weight.is_meta for weight in made.causal.parameters())


def test_what_cannot_be_placed_is_refused():
    check_placement("auto")
    with pytest.raises(RecipeError, match="cuda:77 is no device here"):
        check_placement({"cuda:77": 1 << 30})
    with pytest.raises(ModelError, match="a quantised base is not placed"):
        check_placement("auto", Nf4())
    with pytest.raises(ModelError, match="no room in cpu: some of it would go to disk"):
        place(decoder(), {"cpu": 20_000})
    made = decoder()
    assert set(place(made, "auto").values()) == {"cpu" if not torch.cuda.is_available() else "0"}
