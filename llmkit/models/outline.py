"""The shape of a model whose weights are not here: from `config.json`, or from a small table of public ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.core.errors import ModelError
from llmkit.core.shape import Shape
from llmkit.models.here import config_here
from llmkit.models.node import ModelRef
from llmkit.models.safe import check_folder, read_json

DENSE = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose weights follow from the configuration as `tensors` says."""


def _config(kind: str, layers: int, hidden: int, inner: int, heads: int, groups: int, vocab: int, **more: Any) -> Any:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocab}
    return {"model_type": kind, "num_attention_heads": heads, "num_key_value_heads": groups, **sizes, **more}


_LLAMA_8B = _config("llama", 32, 4096, 14336, 32, 8, 128256)
_LLAMA_70B = _config("llama", 80, 8192, 28672, 64, 8, 128256)
PUBLIC: dict[str, Mapping[str, Any]] = {
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70B,
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": {**_LLAMA_8B, "tie_word_embeddings": True},  # no head of a vocabulary
    "mistralai/Mistral-7B-v0.3": _config("mistral", 32, 4096, 14336, 32, 8, 32768),
    "Qwen/Qwen2.5-7B-Instruct": _config("qwen2", 28, 3584, 18944, 28, 4, 152064),
    "Qwen/Qwen2.5-72B-Instruct": _config("qwen2", 80, 8192, 29568, 64, 8, 152064),
    "Qwen/Qwen3-8B": _config("qwen3", 36, 4096, 12288, 32, 8, 151936, head_dim=128),
    "Qwen/Qwen3-32B": _config("qwen3", 64, 5120, 25600, 64, 8, 151936, head_dim=128),
}
"""The sizes in the `config.json` of public models, which a plan needs and a download is too much for."""


def config_of(ref: ModelRef) -> Mapping[str, Any] | None:
    """The configuration of a model that is here or in the table; None of any other."""
    return config_here(ref) or PUBLIC.get(ref.name)


def outline(ref: ModelRef) -> Shape | None:
    """The shape of a model of the table, or of a folder with a configuration and no weights; None of any other.

    Raises:
        ModelError: the folder's family is not one whose weights follow from its configuration.
    """
    folder = Path(ref.name).expanduser()
    if (folder / "config.json").is_file():
        if next(folder.glob("*.safetensors"), None) is not None:
            return stored(folder)
        config: Mapping[str, Any] = read_json(folder / "config.json")
        if config.get("model_type") not in DENSE:
            what = f"{ref.name} has no weights, and those of {config.get('model_type')} do not follow from config.json"
            raise ModelError(what, fix="give a folder with weights", key="model")
        return Shape.read(config, tensors(config))
    config = PUBLIC.get(ref.name, {})
    return Shape.read(config, tensors(config)) if config else None


def stored(folder: Path) -> Shape:
    """The shape of a model by the headers of its files.

    Raises:
        ModelError: they are not sound.
    """
    headers = check_folder(folder)
    held = {name: item["shape"] for header in headers.values() for name, item in header.items()}
    return Shape.read(read_json(folder / "config.json"), held)


def tensors(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shape of each weight of a dense decoder (`DENSE`), by its name in the files."""
    kind, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or hidden // heads
    made = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    if not config.get("tie_word_embeddings"):
        made["lm_head.weight"] = [config["vocab_size"], hidden]
    inside = {
        "self_attn.q_proj.weight": [heads * width, hidden],
        "self_attn.k_proj.weight": [groups * width, hidden],
        "self_attn.v_proj.weight": [groups * width, hidden],
        "self_attn.o_proj.weight": [hidden, heads * width],
        "mlp.gate_proj.weight": [inner, hidden],
        "mlp.up_proj.weight": [inner, hidden],
        "mlp.down_proj.weight": [hidden, inner],
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
    }
    if kind == "qwen2":
        inside |= {
            f"self_attn.{name}_proj.bias": [n * width] for name, n in (("q", heads), ("k", groups), ("v", groups))
        }
    if kind == "qwen3":
        inside |= {f"self_attn.{name}_norm.weight": [width] for name in "qk"}
    layers = range(config["num_hidden_layers"])
    return made | {f"model.layers.{layer}.{name}": size for layer in layers for name, size in inside.items()}
