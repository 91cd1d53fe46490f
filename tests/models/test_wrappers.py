"""Wrapper checkpoints in their published layout: their text loads, trains and exports, or they are refused by name."""

import json
import shutil

import pytest
import torch
import transformers as hf
from peft import AutoPeftModelForCausalLM, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmkit import Merge
from llmkit.adapters.method import Around
from llmkit.adapters.node import Lora, NoAdapter
from llmkit.core.errors import ModelError
from llmkit.models.load import How, load, quiet
from llmkit.models.node import ModelRef, Nf4
from llmkit.models.resolve import resolve
from llmkit.models.wrappers import towers
from tests.conftest import make_tokenizer
from tests.faults import go, sft

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 448, "max_position_embeddings": 512, "attention_dropout": 0.0}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SEES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SEES |= {"image_size": 28, "patch_size": 14}
IMAGE = {"image_token_index": 440}
IDS = {"image_token_id": 440, "video_token_id": 441}


def rope(**more):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **more}}


WRAPPERS = {
    "Gemma3": lambda: hf.Gemma3Config(
        text_config=TEXT | {"sliding_window": 16},
        vision_config=SEES | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        boi_token_index=441,
        eoi_token_index=442,
        **IMAGE,
    ),
    "Qwen3_5": lambda: hf.Qwen3_5Config(
        text_config=TEXT
        | {"layer_types": ["full_attention"] * 2}
        | rope(mrope_section=[1, 1, 0], partial_rotary_factor=0.5),
        vision_config={"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "out_hidden_size": 32},
        **IDS,
    ),
    "Mllama": lambda: hf.MllamaConfig(
        text_config=TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]} | rope(),
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_global_layers": 1}
        | {"attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 32}
        | {"intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]},
        **IMAGE,
    ),
    "Llama4": lambda: hf.Llama4Config(
        text_config=TEXT | {"num_local_experts": 2, "intermediate_size_mlp": 48, "num_experts_per_tok": 1},
        vision_config=SEES | {"projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16},
        **IMAGE,
    ),
    "Llava": lambda: hf.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=SEES | {"model_type": "clip_vision_model"},
        vision_feature_layer=-1,
        **IMAGE,
    ),
    "Mistral3": lambda: hf.Mistral3Config(
        text_config=TEXT | {"model_type": "mistral"},
        vision_config=SEES | {"model_type": "pixtral", "head_dim": 8},
        vision_feature_layer=-1,
        **IMAGE,
    ),
    "Qwen2VL": lambda: hf.Qwen2VLConfig(
        text_config=TEXT | rope(mrope_section=[2, 1, 1]),
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
        **IDS,
    ),
    "Qwen2_5_VL": lambda: hf.Qwen2_5_VLConfig(
        text_config=TEXT | rope(mrope_section=[2, 1, 1]),
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32},
        **IDS,
    ),
}
LOADED = {"Gemma3": "language_model.model", "Qwen3_5": "model.language_model", "Llama4": "language_model.model"}
"""Those whose text loads, and where their files keep it."""
REFUSED = sorted(WRAPPERS.keys() - LOADED)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Gives the folder of a wrapper, made once: do not write into it."""
    root = tmp_path_factory.mktemp("wrappers")

    def folder(name):
        if not (root / name).is_dir():
            torch.manual_seed(0)
            with quiet():
                getattr(hf, f"{name}ForConditionalGeneration")(WRAPPERS[name]()).save_pretrained(root / name)
            make_tokenizer().save_pretrained(root / name)
        return root / name

    return folder


def opened(folder, **how):
    ref = ModelRef(name=str(folder))
    return load(resolve(ref), ref, How(**how)).model


def logits(model):
    tokens = torch.tensor([[5, 77, 301, 8, 260, 19, 33]])
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("name", LOADED)
def test_the_text_of_a_wrapper_gives_what_the_wrapper_gives(name, made):
    with safe_open(made(name) / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert any(weight.startswith(f"{LOADED[name]}.layers.0.") for weight in names)  # the published layout
    with quiet():
        whole = getattr(hf, f"{name}ForConditionalGeneration").from_pretrained(made(name))
    torch.testing.assert_close(logits(opened(made(name))), logits(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("harm", ["lacks", "shape", "more"])
def test_a_weight_that_is_missing_misshapen_or_too_many_is_named_and_none_is_made_up(harm, name, made, tmp_path):
    folder = shutil.copytree(made(name), tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    tensor = f"{LOADED[name]}.layers.0.self_attn.q_proj.weight"
    if harm == "more":
        held[tensor.replace("q_proj", "r_proj")] = torch.zeros(4)
    else:
        gone = held.pop(tensor)
        held |= {tensor: gone[:-8].clone()} if harm == "shape" else {}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"lacks": r"lacks the weight \S*layers\.0\.self_attn\.q_proj\.weight", "more": r"no place for \S*r_proj"}
    said |= {"shape": r"lacks \S*q_proj\.weight of shape \[(32|64), 32\], not \[(24|56), 32\]"}
    with pytest.raises(ModelError, match=said[harm]):
        opened(folder)


def trained(folder, rows, out, adapter, **more):
    source = [{"kind": "jsonl", "path": str(rows)}]
    data, optim = {"train": source, "max_length": 64, "packing": "none"}, {"kind": "adamw", "lr": 1e-2}
    more |= {"data": data, "steps": 2, "adapter": adapter, "optim": optim, "evaluate": {}}
    return go(sft(folder, rows, out, **more)).folder / "model"


@pytest.mark.parametrize("name", LOADED)
def test_an_adapter_of_a_wrappers_text_loads_in_peft(name, made, rows, tmp_path):
    model = trained(made(name), rows, tmp_path / "run", {"kind": "lora", "rank": 2})
    with quiet():
        theirs = AutoPeftModelForCausalLM.from_pretrained(model)
    ours = opened(model)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-6)
    moved = logits(ours) - logits(opened(made(name)))
    assert moved.abs().max() > 1e-3  # the control: two steps changed something


def test_a_wrapper_in_4_bits_trains_and_merges(made, rows, tmp_path):
    quantised = trained(made("Gemma3"), rows, tmp_path / "run", {"kind": "lora", "rank": 2}, quant="bnb_nf4")
    assert "4bit" in str(opened(quantised, quant=Nf4()))
    facts = go(Merge(model=str(quantised), out=str(tmp_path / "merged"))).manifest
    assert facts["way"] == "into the dequantised base" and facts["logit_difference"] < 1e-3
    with quiet():
        theirs, told = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model", output_loading_info=True)
    assert not any(told.values())
    torch.testing.assert_close(logits(theirs), logits(opened(tmp_path / "merged")), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOADED)
def test_all_weights_of_a_wrappers_text_load_in_transformers(name, made, rows, tmp_path):
    model = trained(made(name), rows, tmp_path / "run", {"kind": "none"})
    with quiet():
        theirs, told = hf.AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(told.values())
    torch.testing.assert_close(logits(theirs), logits(opened(model)), rtol=1e-5, atol=1e-6)
    assert (logits(theirs) - logits(opened(made(name)))).abs().max() > 1e-3


def test_what_text_never_reaches_is_neither_trained_nor_lost(made, rows, tmp_path):
    before = load_file(made("Gemma3") / "model.safetensors")
    model = trained(made("Gemma3"), rows, tmp_path / "full", {"kind": "none"})
    after = load_file(model / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "language_model." not in name}
    trained(made("Gemma3"), rows, tmp_path / "lora", {"kind": "lora", "rank": 2})
    kept = load_file(tmp_path / "lora" / "checkpoints" / "step-2" / "tensors-0-of-1.safetensors")
    assert kept and all("language_model." in name for name in kept)


def gradients(model):
    tokens = torch.tensor([[5, 77, 301, 8, 260, 19, 33]])
    model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapter", [Lora(rank=2), NoAdapter()], ids=lambda node: node.kind)
@pytest.mark.parametrize("name", LOADED)
def test_a_wrappers_text_has_the_gradients_of_transformers_and_none_beside_it(name, adapter, made):
    ours = opened(made(name))
    with quiet():
        theirs = hf.AutoModelForCausalLM.from_pretrained(made(name))
    ours, theirs = ours.requires_grad_(False), theirs.requires_grad_(False)
    adapted = adapter.attach(ours, Around(towers(ours)))
    if adapter.kind == "lora":
        plain = get_peft_model(theirs, adapted.peft_config["default"])
        for model in (adapted, plain):
            for weight, p in model.named_parameters():
                if "lora_" in weight:
                    torch.manual_seed(len(weight))
                    torch.nn.init.normal_(p, std=0.1)
    else:
        plain = adapter.attach(theirs, Around(towers(theirs)))
    mine, other = gradients(adapted), gradients(plain)
    assert mine.keys() == other.keys() == {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert not any(tower in weight for tower in ("vision", "projector", "router.lora") for weight in mine)
    for weight, grad in mine.items():
        torch.testing.assert_close(grad, other[weight], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_other_wrappers_are_refused_by_name_in_one_line(name, made):
    tower = json.loads((made(name) / "config.json").read_text())["text_config"]["model_type"]
    said = rf"is a {name}ForConditionalGeneration, not a causal language model: .* text tower \({tower}\) only inside"
    with pytest.raises(ModelError, match=said) as caught:
        opened(made(name))
    assert caught.value.code == 4 and "\n" not in str(caught.value)
