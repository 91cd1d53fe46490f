"""From chunks to logits: the one place of the engine that makes tensors for the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from llmkit.core.types import KeyValueStore, Paged, Span
from llmkit.inference.scheduler import Chunk


class Forward(Protocol):
    """A model as the engine sees it, on whatever devices or processes it lies."""

    @property
    def device(self) -> torch.device:
        """Where tokens are put."""
        ...

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Paged, adapters: Sequence[str]) -> Tensor:
        """Last hidden states (N, H) of tokens (N,) at positions (N,).

        `adapters` has the key of that of each span, empty for none; tokens past the vocabulary are virtual ones, in the
        order in which the span's adapter has them.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, H) -> (R, V), as the family makes them, in fp32."""
        ...


class Runner:
    """Runs what a step holds."""

    def __init__(self, forward: Forward, store: KeyValueStore) -> None:
        self.forward, self.store = forward, store

    @torch.no_grad()
    def run(self, chunks: Sequence[Chunk], whole: Sequence[bool]) -> list[Tensor]:
        """For each chunk the logits after its last token, (1, V), or where `whole` says so after each, (n, V)."""
        sizes = [chunk.end - chunk.start for chunk in chunks]
        starts = [0, *accumulate(sizes)]
        spans = tuple(
            Span(0, at, at + size, chunk.start, tuple(chunk.sequence.blocks))
            for at, size, chunk in zip(starts, sizes, chunks, strict=False)
        )
        device = self.forward.device
        tokens = torch.tensor([token for chunk in chunks for token in chunk.tokens], device=device)
        positions = torch.cat([torch.arange(chunk.start, chunk.end) for chunk in chunks]).to(device)
        names = [chunk.sequence.adapter for chunk in chunks]
        hidden = self.forward.hidden(tokens, positions, Paged(self.store, spans), names)
        rows = [
            torch.arange(span.start if all_ else span.end - 1, span.end)
            for span, all_, chunk in zip(spans, whole, chunks, strict=True)
            if all_ or chunk.last
        ]
        if not rows:
            return [hidden.new_empty(0, 0) for _ in chunks]
        made = iter(self.forward.logits(hidden[torch.cat(rows).to(device)]).split([len(row) for row in rows]))
        wanted = [all_ or chunk.last for all_, chunk in zip(whole, chunks, strict=True)]
        return [next(made) if want else hidden.new_empty(0, 0) for want in wanted]
