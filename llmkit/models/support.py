"""What each family supports, measured on a tiny model of it: `python -m llmkit.models.support > docs/support.md`.

A context must give the logits and the gradients of transformers' own eager attention on each sequence alone. Both are
computed in fp64 throughout, where equal means 1e-10 of the largest value and rounding cannot hide or feign a fault.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmkit.core.types import Packed, Paged, Segment, Span, Tree
from llmkit.models.attend import Context, install
from llmkit.models.paged import BlockStore
from llmkit.models.probe import probe

BAR = 1e-10

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
    "Granite": ("GraniteConfig", {}),
    "Cohere-2": ("Cohere2Config", {**WINDOW, **MIXED}),
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
}
"""Family -> its configuration class in transformers and what differs from `SMALL`."""


@dataclass(frozen=True)
class Row:
    """Which contexts, and whether packed gradients stay exact through an adapter and under recompute."""

    family: str
    packed: bool
    tree: bool
    paged: bool
    lora: bool
    recompute: bool
    reason: str


class Doubled(TorchFunctionMode):
    """Computes in fp64 what transformers casts to fp32: norms, rotations, routers, softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        kwargs = {key: _doubled(value) for key, value in (kwargs or {}).items()}
        return func(*map(_doubled, args), **kwargs)


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


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


@dataclass(frozen=True)
class Case:
    """One row under a context, and the sequences that it stands for: `paths` are indices into `tokens`."""

    tokens: Tensor
    positions: Tensor
    context: Context
    paths: tuple[tuple[int, ...], ...]


def packed_case() -> Case:
    """Sequences of 11, 1 and 7 tokens and one token of padding; windows are 4."""
    ends = [0, 11, 12, 19]
    spans = list(pairwise(ends))
    positions = [place for start, end in spans for place in range(end - start)] + [0]
    segments = tuple(Segment(0, start, end) for start, end in spans)
    return _case(positions, Packed(segments), [range(*span) for span in spans])


def tree_case() -> Case:
    """A prefix of 5, branches of 7 and of 1 token, and a branch of 3 on the first."""
    segments = (Segment(0, 0, 5), Segment(0, 5, 12, 0), Segment(0, 12, 13, 0), Segment(0, 13, 16, 1))
    positions = [*range(12), 5, 12, 13, 14]
    return _case(positions, Tree(segments), [[*range(12), 13, 14, 15], [*range(5), 12]])


def _case(positions: list[int], context: Context, paths: Sequence[Sequence[int]]) -> Case:
    drawn = torch.randint(3, 64, (len(positions),), generator=torch.Generator().manual_seed(1))
    return Case(drawn, torch.tensor(positions), context, tuple(tuple(path) for path in paths))


def contexted(model: Any, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (T, V) of the row under its context, and the gradients of their sum by fixed random factors."""
    out = model(input_ids=case.tokens[None], position_ids=case.positions[None], attend=case.context).logits[0]
    used = sorted({place for path in case.paths for place in path})
    (out * _factors(out.shape[0], out))[used].sum().backward()
    return out.detach(), _taken(model)


def alone(model: Any, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from each path run alone; tokens that paths share count once."""
    seen: set[int] = set()
    total: Tensor | None = None
    for path in case.paths:
        out = model(input_ids=case.tokens[list(path)][None], use_cache=False).logits[0]
        total = out.new_zeros(len(case.tokens), out.shape[1]) if total is None else total
        total[list(path)] = out.detach()
        new = [place for place in path if place not in seen]
        here = [path.index(place) for place in new]
        (out[here] * _factors(len(case.tokens), out)[new]).sum().backward()
        seen.update(path)
    if total is None:
        raise ValueError("a case has at least one path")
    return total, _taken(model)


def cached(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of two sequences with a common first block, in chunks and with a decode step; and of each alone."""
    case = _case([0] * 16, Packed(()), [])
    first, second = case.tokens[:9], torch.cat([case.tokens[:4], case.tokens[9:16]])
    store, blocks = BlockStore(8, 4), ((5, 0, 7), (5, 2, 6))
    made: list[list[Tensor]] = [[], []]
    for steps in (((0, 0, 6),), ((0, 6, 8), (1, 4, 10)), ((0, 8, 9), (1, 10, 11))):
        at = [0, *accumulate(end - start for _, start, end in steps)]
        spans = tuple(Span(0, a, b, s[1], blocks[s[0]]) for (a, b), s in zip(pairwise(at), steps, strict=True))
        row = torch.cat([(first, second)[which][start:end] for which, start, end in steps])
        places = torch.cat([torch.arange(start, end) for _, start, end in steps])
        out = model(input_ids=row[None], position_ids=places[None], attend=Paged(store, spans)).logits[0]
        for (which, _, _), span in zip(steps, spans, strict=True):
            made[which].append(out[span.start : span.end])
    model.set_attn_implementation("eager")
    whole = [model(input_ids=tokens[None], use_cache=False).logits[0] for tokens in (first, second)]
    return torch.cat([*made[0], *made[1]]), torch.cat([whole[0], whole[1][4:]])


def _factors(length: int, like: Tensor) -> Tensor:
    return torch.randn(length, like.shape[1], generator=torch.Generator().manual_seed(2)).to(like.dtype)


def _taken(model: Any) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def off(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of `b`."""
    return float(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).detach())


def worst(model: Any, case: Case, owner: Any = None) -> tuple[float, float]:
    """How far a context is from its paths alone: logits, and the worst gradient. `owner` is the model in a wrapper."""
    owner = model if owner is None else owner
    used = sorted({place for path in case.paths for place in path})
    with Doubled():
        owner.set_attn_implementation("eager")
        logits, grads = alone(model, case)
        install(owner, "sdpa")
        ours, our_grads = contexted(model, case)
    if grads.keys() != our_grads.keys():
        return off(ours[used], logits[used]), float("inf")
    return off(ours[used], logits[used]), max(off(our_grads[name], grads[name]) for name in grads)


def measure(family: str) -> Row:
    """One row of the table."""
    model = tiny(family)
    install(model, "auto")
    support = probe(model)
    if not support.packed:
        return Row(family, False, False, False, False, False, support.reason)
    model = exact(model)
    packed = max(worst(model, packed_case())) <= BAR
    tree = support.tree and max(worst(model, tree_case())) <= BAR
    with torch.no_grad(), Doubled():
        paged = support.paged and off(*cached(model)) <= BAR
    # the backward pass leaves `Doubled`, so recomputing enters it again
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), Doubled())})
    recompute = max(worst(model, packed_case())) <= BAR
    model.activation_checkpointing_disable()
    lora = max(worst(adapted(model), packed_case(), model)) <= BAR
    return Row(family, packed, tree, paged, lora, recompute, support.reason)


def exact(model: Any) -> Any:
    """The model in fp64; its experts one by one, because grouped products know no fp64."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model.double()


def adapted(model: Any) -> Any:
    """The model with a LoRA of rank 2 on every linear layer, none of whose factors is zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config).double()


HEAD = """# What each family supports

Generated by `python -m llmkit.models.support`; the tests measure it again. Each family runs as a model of 2 layers with
random weights, segments of 1 to 11 tokens and windows of 4. `yes` means: logits and every gradient equal those of
transformers' own eager attention on each sequence alone, to 1e-10 in fp64 (`paged` has no gradients).

- `packed`: many sequences in one row. `tree`: a shared prefix with branches. `paged`: blocks of cached keys and values.
- `LoRA`, `recompute`: packed, through an adapter on all linear layers, and with activations computed again.

Every model is tried when it is loaded, listed here or not: the last hidden states of two short sequences, without
gradients, must be those of eager attention to 2e-5 in fp32 and to 1e-1 in 16 bits or over quantised weights. Where the
answer is no, packing, trees and the engine are refused by name; padded training and `generate` work as in transformers.

| family | packed | tree | paged | LoRA | recompute | why not |
|---|---|---|---|---|---|---|
"""


def table(rows: Sequence[Row]) -> str:
    """The rows as docs/support.md."""
    return HEAD + "".join(
        f"| {row.family} | "
        + " | ".join("yes" if cell else "no" for cell in (row.packed, row.tree, row.paged, row.lora, row.recompute))
        + f" | {row.reason} |\n"
        for row in rows
    )


if __name__ == "__main__":
    sys.stdout.write(table([measure(family) for family in FAMILIES]))
