"""A head that drafts: one decoder layer over the hidden states of a model, which stays as it is (EAGLE-3,
arXiv:2503.01840).

Row t reads the token at t + 1 and the model's feature at t, and says what comes at t + 2. The feature is made of the
hidden states of several layers in a text's first drafted row, and is the head's own output in those after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkit.core.types import Packed, Paged
from llmkit.models.attend import KINDS, attention
from llmkit.models.heads import causal_of


@dataclass(frozen=True)
class HeadShape:
    """The sizes of a head; all but `taps` and `words` are those of its model."""

    width: int
    """H: of the model's hidden states, and of the head's."""
    embedded: int
    """E: of the model's embeddings."""
    inner: int
    """Of the gated product."""
    heads: int
    kv_heads: int
    head_size: int
    words: int
    """Of the draft vocabulary."""
    taps: tuple[int, ...]
    """Which hidden states are read, as transformers numbers them: i is the output of the i-th layer, counted from 1,
    and the number of layers is what the model's own head reads, after its norm."""
    theta: float = 10000.0
    """The base of RoPE."""
    eps: float = 1e-6


def shape_for(model: Any, words: int, taps: Sequence[int] = ()) -> HeadShape:
    """The sizes of a head for a model of transformers; without `taps` a low, a middle and the last hidden state."""
    causal = causal_of(model)
    config = causal.config.get_text_config()
    layers = int(config.num_hidden_layers)
    if getattr(config, "is_heterogeneous", False):  # Gemma 4: layers of two head sizes
        config = config.per_layer_config[-1]
    heads, width = int(config.num_attention_heads), int(config.hidden_size)
    embedding = causal.get_input_embeddings()
    size = int(getattr(config, "head_dim", None) or width // heads)
    inner: Any = getattr(config, "intermediate_size", None) or 4 * width  # some have one for each layer
    return HeadShape(
        width,
        int(embedding.weight.shape[-1]),
        max(inner) if isinstance(inner, list | tuple) else int(inner),
        heads,
        int(getattr(config, "num_key_value_heads", None) or heads),
        size + size % 2,
        words,
        tuple(sorted(set(taps or (min(2, layers), max(1, layers // 2), layers)))),
        _theta(getattr(config, "rope_parameters", None)),
        float(getattr(config, "rms_norm_eps", None) or 1e-6),
    )


def _theta(said: Any) -> float:
    """The base of RoPE in a configuration; some have one for each kind of layer."""
    if not isinstance(said, dict):
        return HeadShape.theta
    if "rope_theta" in said:
        return float(said["rope_theta"])
    return next((_theta(part) for part in said.values() if isinstance(part, dict)), HeadShape.theta)


class DraftHead(nn.Module):
    """One decoder layer, its norm and its output layer over a vocabulary of its own.

    The embeddings are the model's: they are neither trained nor saved with it.
    """

    layer_idx = 0
    is_causal = True
    ids: Tensor
    frequencies: Tensor

    def __init__(self, shape: HeadShape, embedding: nn.Module, ids: Tensor | None = None) -> None:
        """`embedding`: the model's; `ids`: (V,) which word of the model each of the draft vocabulary is."""
        super().__init__()
        self.shape, self.embedding = shape, [embedding]  # in a list: it is no part of this module
        both, width = shape.embedded + shape.width, shape.width
        query, key = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        self.fuse = nn.Linear(width * len(shape.taps), width, bias=False)
        self.embed_norm = nn.RMSNorm(shape.embedded, shape.eps)
        self.feature_norm = nn.RMSNorm(width, shape.eps)
        self.q, self.k, self.v = (nn.Linear(both, out, bias=False) for out in (query, key, key))
        self.near = nn.Linear(both, width, bias=False)
        self.o = nn.Linear(query, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, shape.eps)
        self.gate, self.up = (nn.Linear(width, shape.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.inner, width, bias=False)
        self.norm = nn.RMSNorm(width, shape.eps)
        self.out = nn.Linear(width, shape.words, bias=False)
        self.register_buffer("ids", torch.arange(shape.words) if ids is None else ids)
        halves = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
        self.register_buffer("frequencies", shape.theta**-halves, persistent=False)

    @property
    def taps(self) -> tuple[int, ...]:
        """Which hidden states `features` takes, in order (`HeadShape.taps`)."""
        return self.shape.taps

    def features(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """The model's hidden states of `taps`, (N, H) each -> features (N, H)."""
        return cast(Tensor, self.fuse(torch.cat([*hidden_states], -1)))

    def forward(self, tokens: Tensor, features: Tensor, positions: Tensor, attend: Packed | Paged) -> Tensor:
        """Tokens (N,) that come after features (N, H), whose positions (N,) those of the features are -> (N, H): what
        `logits` reads, and the features of rows that follow a draft."""
        x = self.mixed(tokens, features)
        kind = KINDS["compiled" if x.device.type == "cpu" else "sdpa"]
        q, k, v = (part.transpose(0, 1)[None] for part in (self.queries(x, positions), *self.cached(x, positions)))
        out, _ = attention(kind)(self, q, k, v, None, attend=attend)
        return self.finished(x, out[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V) over the draft vocabulary; `ids` says which words of the model these are."""
        return cast(Tensor, self.out(self.normed(hidden)))

    def normed(self, hidden: Tensor) -> Tensor:
        """What the output layer reads of (N, H)."""
        return _normed(self.norm, hidden)

    def mixed(self, tokens: Tensor, features: Tensor) -> Tensor:
        """What attention reads, (N, E + H)."""
        with torch.no_grad():
            embedded = self.embedding[0](tokens).to(features.dtype)
        return torch.cat([_normed(self.embed_norm, embedded), _normed(self.feature_norm, features)], -1)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """(N, E + H) at positions (N,) -> (N, heads, D), turned."""
        return self._turned(self.q(x).unflatten(-1, (self.shape.heads, -1)), positions)

    def cached(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(N, E + H) at positions (N,) -> keys, turned, and values, (N, KV, D) each."""
        keys, values = (part(x).unflatten(-1, (self.shape.kv_heads, -1)) for part in (self.k, self.v))
        return self._turned(keys, positions), values

    def finished(self, x: Tensor, attended: Tensor) -> Tensor:
        """What attention read, (N, E + H), and gave, (N, heads, D) -> (N, H). Beside it what was read comes through a
        linear layer, as in EAGLE (arXiv:2401.15077): what is nearest tells most."""
        hidden = self.near(x) + self.o(attended.flatten(-2))
        inner = _normed(self.mlp_norm, hidden)
        return cast(Tensor, hidden + self.down(F.silu(self.gate(inner)) * self.up(inner)))

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """RoPE (arXiv:2104.09864) over (N, heads, D), whose halves are turned against each other."""
        angles = positions[:, None, None] * self.frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """In the type that the norm is held in: under autocast what comes in has 16 bits."""
    return cast(Tensor, norm(x.to(norm.weight.dtype)))
