"""What accounts need to know of a model before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
"""What families call the number of experts that a token goes through."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What they call the number of experts of a layer."""


@dataclass(frozen=True)
class Shape:
    """From a model's configuration and the headers of its weights."""

    params: int
    layers: int
    hidden: int
    intermediate: int
    vocab: int
    linears: int
    """Sum of (in + out) over all linears but the head: a LoRA of rank r has r times as many parameters."""
    keys: int = 0
    """Width of a token's keys, and of its values, in a layer."""
    embedded: int = 0
    """Parameters of embeddings and head: they are never quantised."""
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shape of each weight, by its name in the files; a linear's is (out, in)."""
    chosen: int = 0
    """Of a mixture model, the experts that a token goes through in a layer."""
    choice: int = 0
    """Those of which it goes through some."""

    @property
    def active(self) -> int:
        """Parameters that a token goes through, embeddings too."""
        idle = self.experts * (self.choice - self.chosen) // self.choice if self.choice > self.chosen > 0 else 0
        return self.params - idle

    @property
    def experts(self) -> int:
        """Parameters of experts; those of routers and of experts that every token goes through are none."""
        return sum(prod(shape) for name, shape in self.tensors.items() if ".experts." in name)

    @property
    def mixed(self) -> int:
        """Layers that have experts."""
        return len({name.partition(".experts.")[0] for name in self.tensors if ".experts." in name})

    @staticmethod
    def read(config: Mapping[str, Any], tensors: Mapping[str, list[int]]) -> Shape:
        """From `config.json` and the shape of each weight."""
        text = config.get("text_config") or config
        sizes = {name: prod(shape) for name, shape in tensors.items()}
        embedded = {name for name in tensors if is_embedding(name)}
        linears = sum(sum(shape) for name, shape in tensors.items() if len(shape) == 2 and name not in embedded)
        hidden = int(text.get("hidden_size") or text.get("n_embd") or 0)
        heads = int(text.get("num_attention_heads") or text.get("n_head") or 1)
        groups, width = int(text.get("num_key_value_heads") or heads), int(text.get("head_dim") or hidden // heads)
        return Shape(
            sum(sizes.values()),
            int(text.get("num_hidden_layers") or text.get("n_layer") or 0),
            hidden,
            int(text.get("intermediate_size") or 4 * hidden),
            int(text.get("vocab_size") or 0),
            linears,
            groups * width,
            sum(sizes[name] for name in embedded),
            {name: tuple(shape) for name, shape in tensors.items()},
            next((int(text[key]) for key in CHOSEN if text.get(key)), 0),
            next((int(text[key]) for key in EXPERTS if text.get(key)), 0),
        )


def is_embedding(name: str) -> bool:
    """Whether a weight is of the embeddings or of the head."""
    return "embed" in name or "lm_head" in name


@dataclass(frozen=True)
class Cost:
    """What an adapter asks of memory."""

    trained: int
    """Parameters that are trained: each has a gradient and moments."""
    more: int = 0
    """Parameters that it adds and does not train."""
    low: int = 0
    """Numbers that each linear keeps of a token for the adapter."""
    keeps: Literal["shared", "input", "scaled"] = "shared"
    """What a linear keeps of a token beside that: an input `shared` with its neighbours, an `input` of its own
    (dropout), or also what the base gave (`scaled`: DoRA, IA3)."""
    own: tuple[int, int, int] = (0, 0, 0)
    """Where not 0: what a layer keeps of a token in fp32 over a plain base, instead of what `keeps` says: so many times
    its hidden width, its inner width and its keys' width."""
    head: bool = False
    """The head is trained: its gradient is made."""
    layers: int | None = None
    """Layers like the model's that keep anything for the backward pass, where gradients do not pass through all of the
    model's own."""
    beside: int = 0
    """Numbers in fp32 that are kept of a token beside what layers keep."""
