"""What a recipe names: endings, globs, regular expressions and layers; nothing matched is an error with near names."""

import pytest

from llmkit import Sft
from llmkit.adapters.method import Around
from llmkit.adapters.names import by, in_layers, layer_of, numbers, short
from llmkit.adapters.node import Lora, NoAdapter
from llmkit.core.errors import ModelError, RecipeError
from llmkit.core.shape import Shape
from llmkit.models.safe import check_folder, read_json
from llmkit.train.optim import AdamW
from tests.adapters.properties import folder, opened
from tests.conftest import make_model, make_tokenizer


def test_endings_are_whole_parts_and_globs_whole_names():
    name = "model.layers.3.self_attn.q_proj"
    assert [by(p)(name) for p in ("q_proj", "attn.q_proj", "self_attn.q_proj", "*q_proj", "q_*")] == [
        True, False, True, True, False
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("span", "held"),
    [(3, [3]), (-1, [7]), ("2-4", [2, 3, 4]), ("6-", [6, 7]), ("-1", [0, 1]), ("5", [5]), ("4-2", []), ("x", [])],
)
def test_spans_hold_both_ends(span, held):
    assert list(numbers(span, 8)) == held


def test_layers_are_read_off_names():
    assert (layer_of("model.layers.12.mlp.experts.3.w1"), layer_of("lm_head")) == (12, None)
    assert in_layers((), "lm_head", 4) and not in_layers((0,), "lm_head", 4)


def test_short_names_mean_what_was_chosen_alone():
    names = ["a.0.q", "a.1.q", "a.0.k", "a.1.k", "b.k"]
    assert short(["a.0.q", "a.1.q", "a.0.k"], names) == ["a.0.k", "q"]


WRONG = {
    r"adapter\.targets: 'q_prj' matches nothing of this model; fix: use all-linear, or name": {
        "targets": ("q_prj", "k_proj")
    },
    r"adapter\.targets: 'q_prj' names no linear of LlamaForCausalLM": {"targets": "q_prj"},
    r"adapter\.layers: 2-9 names no layers of 2; fix: give numbers from 0 to 1": {"layers": ("2-9",)},
    r"adapter\.layers: 5 names no layers of 2": {"layers": (5,)},
    r"adapter\.layers: -3 names no layers of 2": {"layers": (-3,)},
    r"adapter\.parameters: LlamaForCausalLM has no experts": {"parameters": ("experts.down_proj",)},
    r"adapter\.modules_to_save: 'lm_haed' matches nothing .* did you mean lm_head": {"modules_to_save": ("lm_haed",)},
    r"adapter\.trainable_tokens: '<\|im_ned\|>' is no token .* did you mean <\|im_end\|>": {
        "trainable_tokens": ("<|im_ned|>",)
    },
}


@pytest.mark.parametrize("said", WRONG)
def test_what_names_nothing_is_an_error(said):
    with pytest.raises(ModelError, match=said):
        Lora(**WRONG[said]).attach(make_model(), Around(tokenizer=make_tokenizer()))


def test_experts_that_are_not_there_are_named():
    with pytest.raises(ModelError, match=r"'experts.gate_proj' matches nothing .* did you mean experts.gate_up_proj"):
        Lora(parameters=("experts.gate_proj",)).attach(opened(folder("mixtral")).model)


@pytest.mark.parametrize(
    ("more", "layers", "told"),
    [
        ({"train": ("*.layers.1.*",)}, {"1"}, ["adapter.train *.layers.1.*: 9 of 20 tensors"]),
        ({"freeze": ("embed_tokens.weight", "*norm*")}, {"0", "1"}, None),
        ({"train": ("*.layers.*",), "freeze": ("*.layers.0.*",)}, {"1"}, None),
    ],
)
def test_globs_choose_what_is_trained_and_their_counts_are_told(more, layers, told):
    said = []
    model = NoAdapter(**more).attach(make_model(), Around(notice=said.append))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[2] for name in trained if "layers" in name} == layers
    assert len(said) == len(more.get("train", ())) + len(more.get("freeze", ()))
    assert told is None or said == told
    assert not any(name == "model.embed_tokens.weight" for name in trained)


def test_a_glob_that_matches_nothing_and_one_that_leaves_nothing():
    with pytest.raises(
        ModelError, match=r"adapter\.freeze: 'embed_token\.weight' .* did you mean embed_tokens\.weight"
    ):
        NoAdapter(freeze=("embed_token.weight",)).attach(make_model())
    with pytest.raises(ModelError, match=r"adapter\.freeze: nothing is left to train"):
        NoAdapter(freeze=("*",)).attach(make_model())


NODES = {
    "all": Lora(rank=4),
    "some": None,
    "whole": Lora(rank=4, modules_to_save=("embed_tokens",)),
    "dora": Lora(rank=4, dora=True),
    "fa": Lora(rank=4, lora_fa=True),
    "full": NoAdapter(),
    "frozen": NoAdapter(train=("*.layers.*",), freeze=("*norm*",)),
}


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("node", NODES)
def test_the_account_counts_what_is_trained(node, family):
    if node == "some":
        fused = {"phi3": "qkv_proj", "mixtral": "v_proj", "qwen3_moe": "v_proj"}
        node = Lora(rank=4, targets=(fused.get(family, "q_proj"), "*o_proj"), layers=(1,))
    else:
        node = NODES[node]
    tensors = {n: item["shape"] for header in check_folder(folder(family)).values() for n, item in header.items()}
    shape = Shape.read(read_json(folder(family) / "config.json"), tensors)
    model = node.attach(opened(folder(family)).model)
    assert node.cost(shape).trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_lora_plus_splits_the_groups_and_leaves_all_else():
    node = Lora(rank=2, lora_plus=16.0)
    model = node.attach(make_model())
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamW(lr=1e-4, weight_decay=0.1).build(named, {name: node.rate(name) for name in named})
    rates = {id(p): group["lr"] for _, group in optimizer.groups for p in group["params"]}
    assert len(optimizer.groups) == 2 and all(group["weight_decay"] == 0.1 for _, group in optimizer.groups)
    assert {rates[id(p)] / 1e-4 for name, p in named.items() if "lora_B" in name} == {16.0}
    assert {rates[id(p)] / 1e-4 for name, p in named.items() if "lora_A" in name} == {1.0}


@pytest.mark.parametrize("kind", ["lora", "ia3", "vera", "oft", "boft"])
def test_a_pattern_that_is_none_is_refused_with_the_recipe(kind):
    with pytest.raises(RecipeError, match=r"adapter\.targets: '\(\[' is no regular expression"):
        Sft(model="m", data={"train": []}, adapter={"kind": kind, "targets": "(["}, out="x")
