"""A model whose layers lie on a disk until their turn says what it says in memory, with its adapters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from llmkit.build.placed import check_placement, place
from llmkit.core.errors import ModelError, RecipeError
from tests.models.test_loras import decoder, drawn, saved, stepped

SIZES = {"cpu": "40KB", "disk": "10MB"}


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


def test_what_cannot_be_placed_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="2 ranks hold together is not placed"):
        check_placement("auto", 2)
    check_placement("auto", 1)
    for placement, what in (
        ({"tpu:0": "1GiB"}, "tpu:0 is no device here"),
        ({"cpu": "much"}, "'much' of cpu is no size"),
    ):
        with pytest.raises(RecipeError, match=what):
            check_placement(placement, 1)
    with pytest.raises(ModelError, match="no room in cpu: some of it would go to disk"):
        place(decoder(), {"cpu": "20KB"})
    made = decoder()
    assert set(place(made, "auto").values()) == {"cpu" if not torch.cuda.is_available() else "0"}
