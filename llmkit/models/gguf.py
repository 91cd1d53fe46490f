"""A Llama-shaped GGUF file to a Hugging Face folder: weights in fp32, tokenizer and template as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path) -> None:
    """Writes config, weights, tokenizer and chat template of `source` into `folder`."""
    from gguf import GGUFReader

    reader = GGUFReader(str(source))
    facts = {
        name: field.contents() for name, field in reader.fields.items() if name.startswith(("llama.", "tokenizer."))
    }
    heads, kv_heads = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
    weights = dict(_tensor(t, heads, kv_heads) for t in reader.tensors)
    tied = "lm_head.weight" not in weights
    _save_weights(folder, weights)
    (folder / "config.json").write_text(json.dumps(_config(facts, weights, tied), indent=1) + "\n")
    ends = {"bos_token_id": facts["tokenizer.ggml.bos_token_id"], "eos_token_id": facts["tokenizer.ggml.eos_token_id"]}
    ends["pad_token_id"] = facts["tokenizer.ggml.padding_token_id"]
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=1) + "\n")
    _save_tokenizer(source, folder, facts["tokenizer.ggml.pre"])


def _tensor(tensor: Any, heads: int, kv_heads: int) -> tuple[str, np.ndarray[Any, Any]]:
    from gguf.quants import dequantize

    parts = tensor.name.split(".")
    layer = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    kind = parts[2] if layer else parts[0]
    values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    values = values.reshape(tuple(int(n) for n in reversed(tensor.shape)))
    if kind in ("attn_q", "attn_k"):
        values = _unpermute(values, heads if kind == "attn_q" else kv_heads)
    return f"{layer}{NAMES[kind]}.weight", np.ascontiguousarray(values)


def _unpermute(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """GGUF interleaves the two halves of each rotary head; transformers keeps them apart."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _save_weights(folder: Path, weights: dict[str, np.ndarray[Any, Any]]) -> None:
    from safetensors.numpy import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _config(facts: dict[str, Any], weights: dict[str, np.ndarray[Any, Any]], tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": round(facts["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": facts["llama.rope.freq_base"],
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _save_tokenizer(source: Path, folder: Path, pre: str) -> None:
    """transformers converts vocabulary and merges; how text is cut up first is set by GGUF's name for it."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    if pre == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
