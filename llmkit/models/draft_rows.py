"""Attention of a head in training: each row over the true rows up to it and over its own drafts (training-time test,
EAGLE-3, arXiv:2503.01840), as it is over the cache when it drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.core.types import Segment


@dataclass(frozen=True)
class Rows:
    """N rows of a packed text of S segments, padded: R rows and L keys of each segment at most."""

    place: Tensor
    """(N,): in the packed text."""
    keys: Tensor
    """(S, L): places of the segments' keys."""
    segment: Tensor
    """(N,)"""
    slot: Tensor
    """(N,): the row's place among its segment's rows."""
    width: int
    """R."""
    begins: Tensor
    """(S,)"""

    def take(self, which: Tensor) -> Rows:
        """Those of the rows that `which` (N,) says, in the same order."""
        return Rows(self.place[which], self.keys, self.segment[which], self.slot[which], self.width, self.begins)


def rows_of(place: Tensor, segments: Sequence[Segment]) -> Rows:
    """Rows at places (N,) of a text of these segments."""
    starts = torch.tensor([s.start for s in segments], device=place.device)
    lengths = torch.tensor([s.end - s.start for s in segments], device=place.device)
    longest = int(lengths.max())
    within = torch.arange(longest, device=place.device)
    keys = starts[:, None] + within.minimum(lengths[:, None] - 1)
    segment = torch.searchsorted(starts, place, right=True) - 1
    first = torch.searchsorted(segment, torch.arange(len(segments), device=place.device))
    slot = torch.arange(len(place), device=place.device) - first[segment]
    return Rows(place, keys, segment, slot, int(slot.max()) + 1 if len(slot) else 0, starts)


def attended(rows: Rows, q: Tensor, keys: Tensor, values: Tensor, own: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Queries (N, H, D) over the true keys and values (T, KV, D) up to their rows, and over those of the rows' own
    drafts, (N, KV, D) each -> (N, H, D)."""
    groups, (_, kv, size) = q.shape[1] // keys.shape[1], keys.shape
    q = q.unflatten(1, (kv, groups)) * size**-0.5
    padded = q.new_zeros(len(rows.begins), rows.width, kv, groups, size)
    padded = padded.index_put((rows.segment, rows.slot), q)
    scores = torch.einsum("srkgd,slkd->srkgl", padded, keys[rows.keys])[rows.segment, rows.slot]
    seen = torch.arange(rows.keys.shape[1], device=q.device) <= (rows.place - rows.begins[rows.segment])[:, None]
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    drafts = [torch.einsum("nkgd,nkd->nkg", q, key) for key, _ in own]
    chances = torch.softmax(torch.cat([scores, *(draft[..., None] for draft in drafts)], -1), -1)
    length = rows.keys.shape[1]
    shares = chances.new_zeros(len(rows.begins), rows.width, kv, groups, length)
    shares = shares.index_put((rows.segment, rows.slot), chances[..., :length])
    out = torch.einsum("srkgl,slkd->srkgd", shares, values[rows.keys])[rows.segment, rows.slot]
    for at, (_, value) in enumerate(own):
        out = out + chances[..., length + at, None] * value[:, :, None]
    return out.flatten(1, 2)
