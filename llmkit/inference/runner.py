"""From chunks to logits: the one place of the engine that makes tensors for the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from llmkit.core.types import KeyValueStore, Paged, Span
from llmkit.inference.scheduler import Chunk

TOGETHER = 64
"""Rows of logits of a prompt that exist at a time."""


class Forward(Protocol):
    """A model as the engine sees it, on whatever devices or processes it lies."""

    @property
    def device(self) -> torch.device:
        """Where tokens are put."""
        ...

    @property
    def trees(self) -> bool:
        """Whether a tree of drafts costs no more than as many tokens of a chain."""
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


class Rows:
    """Logits after the tokens of a chunk, made when they are asked for, some rows at a time: those of a long prompt
    never exist all together."""

    def __init__(self, logits: Callable[[Tensor], Tensor], hidden: Tensor, tail: Tensor | None = None) -> None:
        """`hidden` (n, H); `tail` (k, V) where those after the last k tokens are there already."""
        self.logits, self.hidden, self.tail = logits, hidden, tail
        self.first, self.made = 0, hidden[:0]

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, row: int) -> Tensor:
        """(V,): after token `row`; -1 is the last."""
        at = range(len(self))[row]
        known = 0 if self.tail is None else len(self.tail)
        if self.tail is not None and at >= len(self) - known:
            return self.tail[at - len(self) + known]
        if not self.first <= at < self.first + len(self.made):
            self.first = at // TOGETHER * TOGETHER
            with torch.no_grad():
                self.made = self.logits(self.hidden[self.first : self.first + TOGETHER])
        return self.made[at - self.first]


class Runner:
    """Runs what a step holds."""

    def __init__(self, forward: Forward, store: KeyValueStore) -> None:
        self.forward, self.store = forward, store

    @torch.no_grad()
    def run(self, chunks: Sequence[Chunk], whole: Sequence[bool]) -> list[Rows]:
        """For each chunk the logits after its newest token and after each draft, if the next follows from it, or where
        `whole` says so after each of its tokens."""
        ends = list(accumulate(chunk.end - chunk.start for chunk in chunks))
        starts = [0, *ends]
        spans = tuple(
            Span(0, start, end, chunk.start, tuple(chunk.sequence.blocks), chunk.parents)
            for start, end, chunk in zip(starts, ends, chunks, strict=False)
        )
        ids = [token for chunk in chunks for token in chunk.tokens]
        places = [at for chunk in chunks for at in chunk.places]
        tokens, positions = self._there([ids, places])
        adapters = [chunk.sequence.adapter for chunk in chunks]
        hidden = self.forward.hidden(tokens, positions, Paged(self.store, spans), adapters)
        tails = [chunk.drafts + 1 if chunk.last else 0 for chunk in chunks]
        wanted = [at for end, tail in zip(ends, tails, strict=True) for at in range(end - tail, end)]
        made = self.forward.logits(hidden[self._there([wanted])[0]]).split(tails) if wanted else [None] * len(tails)
        return [
            Rows(self.forward.logits, hidden[start if all_ else end - max(tail, 1) : end], logits if tail else None)
            for start, end, all_, tail, logits in zip(starts, ends, whole, tails, made, strict=False)
        ]

    def _there(self, numbers: list[list[int]]) -> Tensor:
        """Where the model is; all of a step in one transfer that nothing waits for."""
        device = self.forward.device
        made = torch.tensor(numbers, pin_memory=device.type == "cuda")
        return made.to(device, non_blocking=True)
