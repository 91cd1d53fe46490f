"""The LoRA family on every family of models: the properties that hold of each method."""

import pytest

from llmkit.adapters.node import Lora
from llmkit.core.errors import ModelError
from tests.adapters.properties import FAMILIES, check, folder, linears, lora_count, opened

RANK = 4
METHODS = {
    "lora": {},
    "dora": {"dora": True},
    "lora_fa": {"lora_fa": True},
    "pissa": {"init": "pissa"},
    "pissa_niter": {"init": "pissa", "pissa_niter": 4, "rslora": True},
    "olora": {"init": "olora"},
    "eva": {"init": "eva", "eva_tokens": 16},
}


def formula(method, family):
    out = sum(o for _, _, o in linears(family))
    return {"dora": lora_count(family, RANK) + out, "lora_fa": RANK * out}.get(method, lora_count(family, RANK))


CASES = [(m, f) for m in METHODS for f in FAMILIES if m != "pissa_niter" or f in ("phi3", "mixtral")]


@pytest.mark.parametrize(("method", "family"), CASES)
def test_properties(method, family, tmp_path):
    check(Lora(rank=RANK, alpha=8, **METHODS[method]), family, tmp_path, formula(method, family))


EXPERTS = {  # family: E x (in + out) of one layer's experts
    "mixtral": 4 * ((32 + 96) + (48 + 32)),
    "qwen3_moe": 4 * ((32 + 32) + (16 + 32)),
}


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_experts(family, rslora, tmp_path):
    node = Lora(rank=RANK, alpha=8, rslora=rslora, parameters=("experts.gate_up_proj", "*.down_proj"))
    check(node, family, tmp_path, lora_count(family, RANK) + 2 * RANK * EXPERTS[family], tol=5e-6)


def test_experts_alone_and_in_one_layer(tmp_path):
    node = Lora(rank=RANK, targets=(), parameters=("experts.gate_up_proj",), layers=(-1,))
    check(node, "mixtral", tmp_path, RANK * 4 * (32 + 96), tol=5e-6)


def test_linears_whose_names_peft_takes_for_experts_are_left_out_and_told(tmp_path):
    check(Lora(rank=RANK), "qwen2_moe", tmp_path / "all", lora_count("qwen2_moe", RANK))
    told = []
    only = lora_count("glm4_moe", RANK, lambda name: "self_attn" in name)
    check(Lora(rank=RANK), "glm4_moe", tmp_path / "some", only, notice=told.append)
    assert "linears called down_proj, gate_proj, up_proj get no LoRA" in told[0]
    with pytest.raises(ModelError, match=r"adapter\.targets: peft takes up_proj of Glm4MoeForCausalLM for its experts"):
        Lora(targets=("up_proj",)).attach(opened(folder("glm4_moe")).model)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
def test_layers_and_globs(family, tmp_path):
    node = Lora(
        rank=RANK, targets=("*.self_attn.*", "down_proj") if family != "qwen3_moe" else ("*_proj",), layers=("1-",)
    )
    count = lora_count(family, RANK, lambda n: "layers.1." in n and ("self_attn" in n or "down_proj" in n))
    model = check(node, family, tmp_path, count)
    assert not any("layers.0." in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("whole", ["lm_head", "embed_tokens", "model.norm"])
def test_modules_to_save(whole, family, tmp_path):
    more = 32 if whole == "model.norm" else 448 * 32
    check(Lora(rank=RANK, modules_to_save=(whole,)), family, tmp_path, lora_count(family, RANK) + more)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_start_beside_rows_of_tokens_and_whole_modules(family, tmp_path):
    rows = 32 * (1 if family == "llama" else 2)
    node = Lora(rank=RANK, init="pissa", trainable_tokens=("a",), modules_to_save=("model.norm",))
    check(node, family, tmp_path, lora_count(family, RANK) + rows + 32)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "mixtral"])
def test_rows_of_tokens(family, tmp_path):
    rows = 2 * 32 * (1 if FAMILIES[family][1].get("tie_word_embeddings", True) else 2)
    check(Lora(rank=RANK, trainable_tokens=("<|im_end|>", "a")), family, tmp_path, lora_count(family, RANK) + rows)
