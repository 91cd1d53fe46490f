"""Log-probabilities and embeddings of given tokens: by the forward and the head that the trainer has, and no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llmkit.build.laid import laid

Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class Scores:
    """What a model gives to the tokens of one text, or to those that follow a prompt."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    """Of each, of the full vocabulary, at temperature 1; of a first token, which follows nothing, none."""

    @property
    def total(self) -> float:
        """Of all that are known."""
        return sum(one for one in self.logprobs if one is not None)


@torch.no_grad()
def score(scored: Any, rows: Sequence[tuple[Sequence[int], int]], packed: bool, device: str) -> list[Scores]:
    """`Scores` of each (tokens, how many of them are the prompt), in order.

    `scored`: `build/training.py:headed`, at rest. What comes of it is what the trainer's loss is made of, so that the
    ratio of a policy to itself is 1.
    """
    long = [i for i, (ids, _) in enumerate(rows) if len(ids) > 1]
    told: dict[int, list[float]] = {}
    for group, batch in laid([rows[i][0][:-1] for i in long], packed, device):
        labels = torch.zeros_like(batch.tokens)
        taken = [long[i] for i in group]
        for place, ids in zip(places(batch), (rows[i][0] for i in taken), strict=True):
            labels[place] = torch.tensor(list(ids[1:]), device=device)
        logps = scored(replace(batch, labels=labels))
        parts = logps.split([len(rows[i][0]) - 1 for i in taken])
        told |= {i: part.tolist() for i, part in zip(taken, parts, strict=True)}
    made = []
    for index, (ids, start) in enumerate(rows):
        known: list[float | None] = [None, *told.get(index, [])][: len(ids)]
        made.append(Scores(tuple(ids[start:]), tuple(known[start:])))
    return made


@torch.no_grad()
def embed(
    scored: Any, rows: Sequence[Sequence[int]], packed: bool, device: str, pooling: Pooling, normalise: bool
) -> Tensor:
    """(N, H) in fp32 on the CPU: of each row the mean of its last hidden states, or the last of them; of length 1 where
    `normalise`."""
    made: dict[int, Tensor] = {}
    for group, batch in laid(rows, packed, device):
        hidden = scored.hidden(batch).float()
        for i, place in zip(group, places(batch), strict=True):
            own = hidden[place]
            made[i] = (own.mean(0) if pooling == "mean" else own[-1]).cpu()
    if not rows:
        return torch.empty(0, scored.causal[0].config.get_text_config().hidden_size)
    stacked = torch.stack([made[i] for i in range(len(rows))])
    return torch.nn.functional.normalize(stacked, dim=-1) if normalise else stacked


def places(batch: Any) -> list[tuple[int, slice]]:
    """Where each row lies in a batch."""
    if batch.attend is None:
        return [(row, slice(0, length)) for row, length in enumerate(batch.lengths)]
    return [(segment.row, slice(segment.start, segment.end)) for segment in batch.attend.segments]
