"""Tiny models of many families, made from configurations: what support, methods and tests are tried on."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WINDOW = dict(sliding_window=4)
MIXTURE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MIXED = dict(layer_types=["sliding_attention", "full_attention"])
LATENT = dict(
    num_key_value_heads=4,
    head_dim=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
)
LINEAR = dict(
    linear_num_value_heads=2,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
LONG_ROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4, factor=4.0)
SCALED = dict(embedding_multiplier=12.0, attention_multiplier=0.25, residual_multiplier=0.22, logits_scaling=8.0)
ALPHA = dict(rope_type="dynamic", rope_theta=1e4, factor=1.0, alpha=1000.0)
"""A base that is another from the start, and not by the length."""
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)
STILL = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, attention_dropout=0.0, residual_dropout=0.0, dropout=0.0)
"""Of families whose configuration drops out by default: the comparisons run in training mode."""
BORROWED = dict(
    **WINDOW,
    num_hidden_layers=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=2,
    vocab_size_per_layer_input=64,
    hidden_size_per_layer_input=8,
)
"""The upper half attends to the keys and values of the lower half."""
SHARED = dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Gemma-2": ("Gemma2Config", {**WINDOW, "query_pre_attn_scalar": 8}),
    "Gemma-3": ("Gemma3TextConfig", {**WINDOW, **MIXED, "query_pre_attn_scalar": 8}),
    "Mistral": ("MistralConfig", WINDOW),
    "Phi-3": ("Phi3Config", WINDOW),
    "Phi-3, RoPE longrope": ("Phi3Config", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 8}),
    "gpt-oss": (
        "GptOssConfig",
        {**WINDOW, **MIXTURE, **MIXED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "Mixtral": ("MixtralConfig", MIXTURE),
    "Qwen3-MoE": ("Qwen3MoeConfig", MIXTURE),
    "DeepSeek-V3": ("DeepseekV3Config", LATENT),
    "OLMo-2": ("Olmo2Config", {}),
    "SmolLM3": ("SmolLM3Config", {}),
    "Granite": ("GraniteConfig", SCALED),
    "Cohere-2": ("Cohere2Config", {**WINDOW, **MIXED}),
    "Gemma": ("GemmaConfig", {}),
    "Gemma-3n": (
        "Gemma3nTextConfig",
        {**BORROWED, "laurel_rank": 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    ),
    "Gemma-4": ("Gemma4TextConfig", {**BORROWED, "global_head_dim": 16}),
    "Qwen2-MoE": ("Qwen2MoeConfig", {**MIXTURE, "shared_expert_intermediate_size": 16}),
    "Ministral": ("MinistralConfig", {**WINDOW, **MIXED}),
    "Phi": ("PhiConfig", STILL),
    "Phi-3.5-MoE": ("PhimoeConfig", MIXTURE),
    "OLMo": ("OlmoConfig", {}),
    "OLMo-3": ("Olmo3Config", {**WINDOW, **MIXED}),
    "OLMoE": ("OlmoeConfig", MIXTURE),
    "Granite-MoE": ("GraniteMoeConfig", {**MIXTURE, **SCALED}),
    "Cohere": ("CohereConfig", {}),
    "StarCoder2": ("Starcoder2Config", {**WINDOW, **STILL}),
    "Helium": ("HeliumConfig", {}),
    "GLM": ("GlmConfig", {}),
    "GLM-4": ("Glm4Config", {}),
    "GLM-4-MoE": ("Glm4MoeConfig", {**MIXTURE, **SHARED}),
    "DeepSeek-V2": ("DeepseekV2Config", LATENT),
    "EXAONE-4": ("Exaone4Config", {**WINDOW, **MIXED}),
    "ERNIE-4.5": ("Ernie4_5Config", {}),
    "ERNIE-4.5-MoE": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    ),
    "Seed-OSS": ("SeedOssConfig", STILL),
    "Arcee": ("ArceeConfig", {}),
    "HunYuan": ("HunYuanDenseV1Config", {"rope_parameters": ALPHA}),
    "HunYuan-MoE": ("HunYuanMoEV1Config", {**MIXTURE, "moe_topk": 2, "rope_parameters": ALPHA}),
    "Apertus": ("ApertusConfig", {}),
    "dots.llm1": ("Dots1Config", {**WINDOW, **MIXED, **MIXTURE, **SHARED}),
    "MiniMax-M2": ("MiniMaxM2Config", MIXTURE),
    "GPT-2": ("GPT2Config", {**GPT, **STILL}),
    "GPT-BigCode": ("GPTBigCodeConfig", {**GPT, **STILL}),
    "GPT-NeoX": ("GPTNeoXConfig", {}),
    "OPT": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, **STILL}),
    "Qwen3-Next": ("Qwen3NextConfig", {**MIXTURE, **LINEAR}),
    "Granite-hybrid": (
        "GraniteMoeHybridConfig",
        {**MIXTURE, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    ),
    "Falcon-H1": ("FalconH1Config", {**MAMBA, "mamba_d_ssm": 64}),
    "Llama-4": ("Llama4TextConfig", {**MIXTURE, "intermediate_size_mlp": 48, "attention_chunk_size": 8}),
    "Falcon": ("FalconConfig", {"head_dim": None}),
    "GPT-J": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "BLOOM": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "StableLM": ("StableLmConfig", {}),
    "Qwen3.5": ("Qwen3_5TextConfig", LINEAR),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Bamba": ("BambaConfig", {**MAMBA, "attn_layer_indices": [1]}),
    "Jamba": (
        "JambaConfig",
        {
            **MIXTURE,
            **dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
            **dict(mamba_d_state=8, mamba_dt_rank=4),
        },
    ),
    "Mamba": ("MambaConfig", {"state_size": 8, "time_step_rank": 4}),
    "MiniMax": ("MiniMaxConfig", {**MIXTURE, "layer_types": ["linear_attention", "full_attention"], "block_size": 8}),
    "Nemotron": ("NemotronConfig", {}),
}
"""Family -> its configuration class in transformers and what differs from `SMALL`."""


def tiny(family: str, spread: float = 0.2) -> Any:
    """A model of the family with 2 layers and random weights; `spread` is their standard deviation."""
    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    settings = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():  # norms stay near what they were; nothing stays 0
            noise = torch.randn_like(parameter) * spread
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    return model
