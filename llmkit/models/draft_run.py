"""A draft head as the engine runs it: over cached keys and values, in few calls where the compiled rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from llmkit_kernels import linear, paged
from llmkit_kernels.build import lacks
from llmkit_kernels.norm import rms_norm
from torch import Tensor

from llmkit.core.types import Paged
from llmkit.models.draft_head import DraftHead

STRETCH = 1024
"""Positions by which the table of rotations grows."""


class HeadRun:
    """What `DraftHead` computes, without gradients."""

    trees = False
    """Each path has blocks of its own: it is given none."""

    def __init__(self, head: DraftHead, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: of the model; on a CPU the head computes in fp32 whatever that is."""
        frequencies, kind = head.frequencies.float(), torch.float32 if device.type == "cpu" else dtype
        self.head, self.device, self.kind = head.to(device, kind).eval().requires_grad_(False), device, kind
        head.frequencies = frequencies.to(device)  # positions have more digits than 16 bits hold
        order = head.ids.argsort()  # a draw goes by the order of the model's words
        head.out.weight = torch.nn.Parameter(head.out.weight[order], requires_grad=False)
        head.ids = head.ids[order]
        self.short = device.type == "cpu" and not (lacks("linear") or lacks("paged"))
        self.weights = [head.near.weight, head.q.weight, head.k.weight, head.v.weight]
        self.turns = torch.empty(2, 0, head.shape.head_size)
        self.ids: list[int] = head.ids.tolist()
        """Of the draft vocabulary the model's words."""

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Paged, adapters: Sequence[str]) -> Tensor:
        """(N, H) after features that are 0: what a store of keys and values is measured by."""
        features = torch.zeros(len(tokens), self.head.shape.width, dtype=self.kind, device=self.device)
        return self.forward(tokens, features, positions, attend)

    def features(self, states: Sequence[Tensor]) -> Tensor:
        """The model's hidden states (N, H) -> features (N, H)."""
        there = torch.cat([state.to(self.device, self.kind) for state in states], -1)
        return linear.linear(there, self.head.fuse.weight) if self.short else self.head.fuse(there)

    def forward(self, tokens: Tensor, features: Tensor, positions: Tensor, attend: Paged) -> Tensor:
        """As `DraftHead.forward`."""
        head, shape = self.head, self.head.shape
        if not self.short:
            return cast(Tensor, head(tokens, features, positions, attend))
        embedded = head.embedding[0](tokens).to(self.device, self.kind)
        both = rms_norm(embedded, head.embed_norm.weight, shape.eps), self._normed(features, head.feature_norm)
        made = linear.many(torch.cat(both, -1), self.weights, [None] * 4)
        near, (q, k, v) = made[:, : shape.width], self._parts(made[:, shape.width :])
        held, turn = attend.store.held(0, k, v), self._turn(positions)
        late = paged.turns(held)
        if not late:
            q, k = self._turned(q, turn), self._turned(k, turn)
        out = paged.attend(q, k, v, held, attend.laid, shape.head_size**-0.5, turn=turn if late else None)
        hidden = near + linear.linear(out.view(len(tokens), -1), head.o.weight)
        inner = linear.gated(self._normed(hidden, head.mlp_norm), head.gate.weight, head.up.weight)
        return hidden + linear.linear(inner, head.down.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V) over the draft vocabulary, in fp32 on the host."""
        if not self.short:
            return self.head.logits(hidden).float().cpu()
        return linear.linear(self._normed(hidden, self.head.norm), self.head.out.weight)

    def _normed(self, x: Tensor, norm: torch.nn.RMSNorm) -> Tensor:
        return rms_norm(x, norm.weight, self.head.shape.eps)

    def _parts(self, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (heads, N, D), keys and values (KV, N, D)."""
        shape = self.head.shape
        q, k, v = made.unflatten(-1, (-1, shape.head_size)).split([shape.heads, *[shape.kv_heads] * 2], 1)
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, D) of positions, from a table."""
        last = int(positions.max())
        if last >= self.turns.shape[1]:
            there = torch.arange((last // STRETCH + 1) * STRETCH)
            angles = there[:, None] * self.head.frequencies
            self.turns = torch.stack([torch.cat([part, part], -1) for part in (angles.cos(), angles.sin())])
        return self.turns[0].index_select(0, positions), self.turns[1].index_select(0, positions)

    @staticmethod
    def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * turn[0] + torch.cat((-high, low), -1) * turn[1]
