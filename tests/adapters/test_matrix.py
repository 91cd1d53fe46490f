"""Methods beside LoRA on every family: their start, their size, their base left alone, saved, read and merged."""

import pytest
import torch

from llmkit.adapters.node import (
    Boft,
    Bottleneck,
    Ia3,
    Lora,
    Oft,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Vera,
)
from llmkit.core.errors import ModelError, RecipeError
from llmkit.core.shape import Shape
from llmkit.models.export import export
from llmkit.models.families import tiny
from llmkit.models.node import Int8, Nf4
from llmkit.models.safe import check_folder, read_json
from tests.adapters.properties import FAMILIES, batches, check, folder, linears, logits, near, opened, two_steps

HIDDEN, LAYERS, KEYS = 32, 2, 16  # of every family in properties.py


def every(size):
    """The sum of `size(in, out)` over the linears."""
    return lambda family: sum(size(i, o) for _, i, o in linears(family))


def vectors(family):
    """IA3's: outputs of keys and values, fused or not, and inputs of down projections."""
    found = [(n.rpartition(".")[2], i, o) for n, i, o in linears(family)]
    return sum(o for n, _, o in found if n in ("k_proj", "v_proj", "qkv_proj")) + sum(
        i for n, i, _ in found if n == "down_proj"
    )


def lstm(d, h, layers):
    made = torch.nn.LSTM(d, h, layers, bidirectional=True)
    return sum(p.numel() for p in made.parameters()) + 2 * h * 2 * h + 2 * h + 2 * h * d + d


def moved(before, after):
    """The stated start of virtual tokens: something else than the base says."""
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


VIRTUAL = {"starts": moved, "packed": False, "merges": False}
MLP = 3 * (HIDDEN * HIDDEN + HIDDEN)
PROJECTED = 5 * KEYS + KEYS * 8 + 8 + 8 * 2 * LAYERS * KEYS + 2 * LAYERS * KEYS
METHODS = {
    "ia3": (Ia3(), vectors, {}),
    "vera": (Vera(rank=8), every(lambda i, o: 8 + o), {}),
    "oft": (Oft(block_size=8), every(lambda i, o: i // 8 * 28), {}),
    "oft-exact": (Oft(block_size=4, cayley_neumann=False, share=True), every(lambda i, o: 6), {}),
    "boft": (Boft(block_size=4), every(lambda i, o: 4 * i + o), {}),
    "prompt": (PromptTuning(virtual_tokens=5), lambda _: 5 * HIDDEN, VIRTUAL),
    "prompt-text": (PromptTuning(virtual_tokens=9, init="text", text="hello world"), lambda _: 9 * HIDDEN, VIRTUAL),
    "prefix": (PrefixTuning(virtual_tokens=5), lambda _: 5 * 2 * LAYERS * KEYS, VIRTUAL),
    "prefix-projection": (
        PrefixTuning(virtual_tokens=5, projection=True, hidden=8, init="random"),
        lambda _: PROJECTED,
        VIRTUAL,
    ),
    "p-tuning": (PTuning(virtual_tokens=5), lambda _: 5 * HIDDEN + MLP, VIRTUAL),
    "p-tuning-lstm": (
        PTuning(virtual_tokens=5, encoder="lstm", hidden=6, layers=3),
        lambda _: 5 * HIDDEN + lstm(HIDDEN, 6, 3),
        VIRTUAL,
    ),
    "bottleneck": (
        Bottleneck(size=6),
        lambda _: 2 * LAYERS * (2 * HIDDEN * 6 + HIDDEN + 6),
        {"merges": False, "plain": False},
    ),
    "bottleneck-mlp": (
        Bottleneck(size=3, after=("mlp",), activation="gelu"),
        lambda _: LAYERS * (2 * HIDDEN * 3 + HIDDEN + 3),
        {"merges": False, "plain": False},
    ),
}
FURTHER = ("oft-exact", "prompt-text", "prefix-projection", "p-tuning-lstm", "bottleneck-mlp")
"""Variants of a method: one family is enough for `make test`."""
ODD = ("phi3", "gemma3", "mixtral")
"""Fused projections, windows and experts: what the others have, these have too."""


def late(name, family):
    """Whether a pair is for `make test-all` alone."""
    return (name in FURTHER and family != "gemma3") or (name in ("vera", "boft", "p-tuning") and family not in ODD)


PAIRS = [
    pytest.param(name, family, marks=[pytest.mark.slow] if late(name, family) else [])
    for name in METHODS
    for family in FAMILIES
    if family != "qwen3_moe"  # to these methods it is as Mixtral
]


def shape(family):
    tensors = {name: item["shape"] for header in check_folder(folder(family)).values() for name, item in header.items()}
    return Shape.read(read_json(folder(family) / "config.json"), tensors)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_method_keeps_its_promises_on_a_family(name, family, tmp_path):
    node, count, more = METHODS[name]
    check(node, family, tmp_path, count(family), **more)
    assert node.cost(shape(family)).trained == count(family)


def test_a_text_begins_as_its_tokens():
    from llmkit.adapters.method import Around

    loaded = opened(folder("llama"))
    node = PromptTuning(virtual_tokens=9, init="text", text="hello world")
    model = node.attach(loaded.model, Around(tokenizer=loaded.tokenizer))
    ids = loaded.tokenizer("hello world")["input_ids"]
    want = loaded.model.get_input_embeddings().weight[torch.tensor((ids * 9)[:9])]
    assert torch.equal(model.get_prompt(1)[0], want)


@pytest.mark.parametrize("kind", [Oft, Boft])
def test_a_block_that_does_not_divide_a_width_is_refused_with_one_that_does(kind):
    with pytest.raises(
        ModelError,
        match=r"adapter\.block_size: blocks of 7 do not divide the 32 inputs of .*q_proj; fix: .* such as 8",
    ):
        kind(block_size=7).attach(opened(folder("llama")).model)


def test_butterfly_factors_without_the_extension_are_refused_and_not_dropped():
    with pytest.raises(ModelError, match=r"adapter\.butterfly_factors: 2 factors need peft's CUDA extension"):
        Boft(butterfly_factors=2).attach(opened(folder("llama")).model)


@pytest.mark.parametrize("node", [Ia3(targets=("nonsense",)), Vera(targets="x.*"), Oft(targets=("proj",))], ids=str)
def test_targets_that_name_nothing_are_an_error_with_what_there_is(node):
    with pytest.raises(
        ModelError, match=r"adapter\.targets: .* names no linear of Llama.*; fix: name endings such as down_proj"
    ):
        node.attach(opened(folder("llama")).model)


def test_idle_modules_get_nothing():
    from llmkit.adapters.method import Around

    for node in (Ia3(), Vera(rank=4), Oft(block_size=4), Boft(), Bottleneck(size=2)):
        model = node.attach(opened(folder("llama")).model, Around(idle=("model.layers.0.mlp", "lm_head")))
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert names and not [n for n in names if ".layers.0.mlp." in n and not isinstance(node, Bottleneck)]


@pytest.mark.parametrize(
    ("node", "key"),
    [
        (lambda: PromptTuning(init="text"), "init"),
        (lambda: PromptTuning(text="hello"), "init"),
        (lambda: PTuning(layers=3), "layers"),
        (lambda: PTuning(dropout=0.1), "dropout"),
        (lambda: PrefixTuning(hidden=8), "hidden"),
        (lambda: Oft(block_size=1), "block_size"),
        (lambda: Bottleneck(after=("head",)), r"after\.0"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(node, key):
    with pytest.raises(RecipeError, match=rf"^{key}: "):
        node()


@pytest.mark.parametrize("quant", [Nf4(), pytest.param(Int8(), marks=pytest.mark.slow)], ids=["nf4", "int8"])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in FURTHER])
def test_over_a_quantised_base_a_method_learns_and_is_read_as_it_was_saved(name, quant, tmp_path):
    node, _, more = METHODS[name]
    loaded = opened(folder("llama"), quant=quant)
    before = logits(loaded.model)
    torch.manual_seed(0)
    model = two_steps(node.attach(loaded.model), batches(more.get("packed", True)))
    export(model, loaded.tokenizer, tmp_path / "model", loaded.resolved, quant)
    after = logits(model)
    assert (after - before).abs().max() > 1e-4 * before.abs().max()
    near(logits(opened(tmp_path / "model", quant=quant).model), after)


def test_what_a_mamba_kernel_reads_past_its_module_is_left_out_and_refused():
    model = tiny("Falcon-H1")
    adapted = Oft(block_size=4).attach(model)
    assert not [n for n, p in adapted.named_parameters() if p.requires_grad and ".mamba.out_proj." in n]
    with pytest.raises(ModelError, match=r"adapter\.targets: model\.layers\.0\.mamba\.out_proj is read by a kernel"):
        Vera(rank=4, targets=("out_proj",)).attach(tiny("Falcon-H1"))


@pytest.mark.parametrize(("family", "endings"), [("Falcon-H1", ["out_proj"]), ("Mamba", ["out_proj", "dt_proj"])])
def test_lora_too_leaves_out_what_is_read_past_its_module(family, endings):
    model = Lora(rank=2).attach(tiny(family))
    model(input_ids=torch.arange(3, 9)[None], use_cache=False).logits.sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 4 and all(p.grad is not None for p in trained.values())
    assert not [n for n in trained if any(f".{ending}." in n for ending in endings)]
    for ending in endings:
        with pytest.raises(ModelError, match=rf"adapter\.targets: .*\.{ending} is read by a kernel .*past any adapter"):
            Lora(rank=2, targets=(ending,)).attach(tiny(family))


def test_a_family_that_a_method_does_not_run_on_is_refused_by_name():
    with pytest.raises(ModelError, match=r"adapter\.kind: DeepseekV3ForCausalLM does not run with oft: "):
        Oft(block_size=4).attach(tiny("DeepSeek-V3"))
    Oft(block_size=4, targets=("down_proj",)).attach(tiny("DeepSeek-V3"))  # the control
