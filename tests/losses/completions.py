"""Batches of completions as losses over policies take them, and the same padded, as TRL has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.core.types import Batch, Branches


@dataclass(frozen=True)
class Drawing:
    """K completions of ragged lengths; everything by token is (N,)."""

    lengths: torch.Tensor
    logps: torch.Tensor
    old: torch.Tensor
    reference: torch.Tensor
    entropy: torch.Tensor
    advantages: torch.Tensor

    @property
    def of(self):
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    def batch(self, which=None, **each):
        """The completions `which`, all where none are said; `each` is of all tokens."""
        which = range(len(self.lengths)) if which is None else which
        kept = torch.isin(self.of, torch.tensor(list(which)))
        of = torch.repeat_interleave(torch.arange(len(which)), self.lengths[list(which)])
        figures = {"old": self.old, "reference": self.reference, **each}
        figures = {name: value[kept] for name, value in figures.items() if value is not None}
        branches = Branches(of, torch.arange(len(which)) // 4, {"advantage": self.advantages[list(which)]}, figures)
        tokens = torch.zeros(1, int(kept.sum()) + 2).long()  # two of a prompt before
        weights = torch.cat([torch.zeros(2), torch.ones(int(kept.sum()))])[None]
        return Batch(tokens, tokens, tokens, weights, None, tuple(which), branches=branches), kept

    def padded(self, each):
        """(N,) as (K, T)."""
        mask = self.mask.bool()
        return each.new_zeros(mask.shape).masked_scatter(mask, each)

    @property
    def mask(self):
        return (torch.arange(int(self.lengths.max()))[None] < self.lengths[:, None]).float()


def drawing(seed=0, completions=8, spread=0.3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (completions,), generator=g)
    n = int(lengths.sum())

    def noise():
        return torch.randn(n, generator=g, dtype=dtype)

    logps = -noise().abs()
    old, reference = logps + spread * noise(), logps + spread * noise()
    return Drawing(lengths, logps, old, reference, noise().abs(), torch.randn(completions, generator=g, dtype=dtype))
