"""Bottleneck blocks: where they stand, under quantisation and recompute, their folder, and what refuses them."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.adapters.blocks import PEFT_TYPE, Followed, read
from llmkit.adapters.node import Bottleneck
from llmkit.build.opening import load
from llmkit.core.errors import ModelError
from llmkit.models.export import export
from llmkit.models.families import tiny
from llmkit.models.heads import Scored
from llmkit.models.load import How
from llmkit.models.load import load as without_ours
from llmkit.models.node import Int8, ModelRef, Nf4
from llmkit.models.resolve import resolve
from tests.adapters.properties import batches, folder, logits, near, opened, two_steps
from tests.conftest import make_model

SHORT = torch.arange(3, 9)[None]


def trained(quant=None):
    loaded = opened(folder("llama"), **({"quant": quant} if quant else {}))
    torch.manual_seed(0)
    return loaded, two_steps(Bottleneck(size=4).attach(loaded.model), batches())


@pytest.fixture
def saved(tmp_path):
    """(a trained model, its folder)."""
    loaded, model = trained()
    export(model, loaded.tokenizer, tmp_path / "adapter", loaded.resolved)
    return model, tmp_path / "adapter"


def test_a_block_adds_its_two_layers_to_what_the_part_gave():
    model, plain = Bottleneck(size=4, activation="silu").attach(make_model()), make_model()
    place = model.get_base_model().model.layers[1].mlp
    torch.nn.init.normal_(place.bottleneck.up.weight)
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    out, block = plain.model.layers[1].mlp(x), place.bottleneck
    want = (
        out + torch.nn.functional.silu(out @ block.down.weight.T + block.down.bias) @ block.up.weight.T + block.up.bias
    )
    near(place(x), want)
    assert [n for n, m in model.named_modules() if isinstance(m, Followed)] == [
        f"base_model.model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")
    ]


def test_library_classes_stay_as_they_are():
    before = make_model()
    Bottleneck(size=4).attach(make_model())
    near(logits(before), logits(make_model()), 0)
    assert not [m for m in before.modules() if isinstance(m, Followed)]


def test_without_its_blocks_it_is_the_base():
    _, model = trained()
    changed, base = logits(model), logits(opened(folder("llama")).model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), changed) and not torch.equal(changed, base)


@pytest.mark.parametrize("quant", [Nf4(), Int8()], ids=str)
def test_over_a_quantised_base_it_is_saved_and_read(quant, tmp_path):
    loaded, model = trained(quant)
    export(model, loaded.tokenizer, tmp_path / "adapter", loaded.resolved, quant)
    ref = ModelRef(name=str(tmp_path / "adapter"))
    found = resolve(ref)
    near(logits(load(found, ref, How(quant=found.quant)).model), logits(model))


def test_recompute_gives_the_same_gradients():
    found = []
    for again in (False, True):
        model = copy.deepcopy(trained()[1]).train()
        if again:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        sum(Scored(model)(batch).sum() for batch in batches()).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0] and all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_its_folder_has_pefts_files_and_names_no_method_of_peft(saved):
    from peft import PeftModel

    said = json.loads((saved[1] / "adapter_config.json").read_text())
    assert (said["peft_type"], said["size"], said["after"]) == (PEFT_TYPE, 4, ["attention", "mlp"])
    names = sorted(load_file(saved[1] / "adapter_model.safetensors"))
    assert names[0] == "base_model.model.model.layers.0.mlp.bottleneck.down.bias" and len(names) == 16
    with pytest.raises(KeyError, match=PEFT_TYPE):
        PeftModel.from_pretrained(make_model(), saved[1])


def test_what_cannot_read_it_says_so(saved):
    ref = ModelRef(name=str(saved[1]))
    with pytest.raises(ModelError, match=f"its method {PEFT_TYPE} is unknown"):
        without_ours(resolve(ref), ref, How())


def test_m11_a_tensor_too_few_too_many_or_of_another_shape_is_named(saved):
    weights = saved[1] / "adapter_model.safetensors"
    held = load_file(weights)
    gone = "base_model.model.model.layers.1.mlp.bottleneck.up.weight"
    wrong = {
        rf"lacks {gone}": {name: value for name, value in held.items() if name != gone},
        r"has no place for more\.weight": held | {"more.weight": torch.zeros(2)},
        rf"has another shape for {gone}": held | {gone: torch.zeros(3, 3)},
    }
    for said, tensors in wrong.items():
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=said):
            opened(saved[1])


@pytest.mark.parametrize(("key", "value"), [("size", 0), ("after", ["head"]), ("activation", "tanh"), ("size", None)])
def test_settings_that_make_no_block_are_refused(saved, key, value):
    path = saved[1] / "adapter_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (said | {key: value}).items() if v is not None}))
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        read(make_model(), saved[1])


@pytest.mark.parametrize(
    ("family", "after", "said"),
    [
        ("BLOOM", ("attention", "mlp"), r"transformer\.h\.0\.self_attention adds its residual itself"),
        ("Qwen3-Next", ("attention",), r"model\.layers\.0 has no attention by a name that we know, but linear_attn"),
    ],
)
def test_a_layer_without_such_a_place_is_refused_and_left_as_it_is(family, after, said):
    model = tiny(family)
    with pytest.raises(ModelError, match=f"adapter.kind: {said}"):
        Bottleneck(size=4, after=after).attach(model)
    assert not [m for m in model.modules() if isinstance(m, Followed)]


@pytest.mark.parametrize("family", ["OLMo-2", "gpt-oss", "Qwen3-Next"])
def test_other_families_have_places_for_it(family):
    model = tiny(family).eval()
    before = logits(model, SHORT)
    adapted = Bottleneck(
        size=4, activation="gelu", after=("mlp",) if family == "Qwen3-Next" else ("attention", "mlp")
    ).attach(model)
    near(logits(adapted, SHORT), before, 0)
    adapted(input_ids=SHORT, use_cache=False).logits.square().sum().backward()
    ups = [p.grad for n, p in adapted.named_parameters() if n.endswith("bottleneck.up.weight")]
    assert ups and all(grad.any() for grad in ups)
