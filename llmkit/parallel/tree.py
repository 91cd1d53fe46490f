"""Gradients that are bit-equal for any number of ranks: fixed shares of a step, added up in one fixed order.

The micro-batches of a step are dealt to a fixed number of virtual shards, whatever the world is. A rank computes some
neighbouring shards, each from zero, and adds them in pairs up a binary tree; ranks go on up the same tree by exchanging
what they have with the one across. Addition commutes to the bit, so all of them end with the same sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkit.parallel.sums import buckets, flat, put_back
from llmkit.parallel.team import Sums, Whole, summed

BUCKET = 64 << 20
"""Bytes that are exchanged at once."""


class Tree(Whole):
    """The team of a rank that computes `shards` of the virtual shards; the shards of a rank, and the ranks of `group`,
    are powers of two."""

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        shards: int,
        group: Any = None,
        say: Callable[[Any], list[Any]] = lambda own: [own],
    ) -> None:
        self.params, self.shards, self.group, self.say = tuple(params.values()), shards, group, say
        self.sums: list[tuple[int, list[Tensor]]] = []
        """Subtrees that wait for their other half: how many shards are in each, and their gradients."""

    def after(self, index: int, turns: int) -> None:
        """At the end of a shard its gradients go up the tree; at the end of the step, across the ranks."""
        if index == 0:
            self.sums = []
        if (index + 1) % (turns // self.shards):
            return
        self.sums.append((1, self._taken()))
        while len(self.sums) > 1 and self.sums[-1][0] == self.sums[-2][0]:
            (count, right), (_, left) = self.sums.pop(), self.sums.pop()
            torch._foreach_add_(left, right)
            self.sums.append((2 * count, left))
        if index + 1 == turns:
            ((_, grads),) = self.sums
            self.sums = []
            self._across(grads)
            for p, grad in zip(self.params, grads, strict=True):
                p.grad = grad

    def _taken(self) -> list[Tensor]:
        """The gradients of the shard that ends; where nothing was learned, zeros, which are added like any other."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        return grads

    def _across(self, grads: list[Tensor]) -> None:
        """Adds to the gradients those of all other ranks."""
        world = 1 if self.group is None else dist.get_world_size(self.group)
        bit = 1
        while bit < world:
            other = dist.get_global_rank(self.group, dist.get_rank(self.group) ^ bit)
            for some in buckets(grads, BUCKET):
                self._swap(some, other)
            bit *= 2

    def _swap(self, grads: list[Tensor], other: int) -> None:
        mine = flat(grads)
        theirs = torch.empty_like(mine)
        swap = [
            dist.P2POp(dist.isend, mine, other, self.group),
            dist.P2POp(dist.irecv, theirs, other, self.group),
        ]
        for work in dist.batch_isend_irecv(swap):
            work.wait()
        put_back(mine + theirs, grads)

    def totals(self, own: Sums) -> dict[str, tuple[float, ...]]:
        """Summed over ranks; sums of fp32 numbers in fp64 do not depend on their order unless these differ widely."""
        return summed(self.say(own))
