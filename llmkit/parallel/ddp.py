"""Replicas that see different tokens and sum their gradients (torch's DistributedDataParallel)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmkit.core.errors import RecipeError
from llmkit.parallel.grid import Grid
from llmkit.parallel.steps import Parts, Steps
from llmkit.parallel.team import Sums, Whole, summed
from llmkit.parallel.tree import Tree


class Replicas(Whole):
    """The team of one replica: gradients are summed, for each already carries the global count."""

    def __init__(
        self,
        scored: nn.Module,
        params: Mapping[str, nn.Parameter],
        group: Any,
        say: Callable[[Any], Any],
        phase: Callable[[str], None],
    ):
        self.say = say
        """A JSON value of this rank -> those of all ranks that see different tokens."""
        alike(params, group)
        self.wrapped = DistributedDataParallel(
            scored, process_group=group, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self.wrapped.register_comm_hook(
            phase, lambda phase, bucket: _sum(group, phase, bucket)
        )  # torch reads annotations

    def around(self, index: int, turns: int) -> AbstractContextManager[Any]:
        """Only the last micro-batch's backward pass sums gradients."""
        return nullcontext() if index + 1 == turns else self.wrapped.no_sync()

    def totals(self, own: Sums) -> dict[str, tuple[float, ...]]:
        """Summed over replicas, in their order."""
        return summed(self.say(own))


def stepper(parts: Parts, grid: Grid | None) -> Steps:
    """Steps of one replica of several, or of the only one.

    Raises:
        RecipeError: parameters are to be updated in the backward pass, before their gradients are summed.
    """
    parts.deferred.fill(parts.scored)
    optimizer = parts.optimizer(parts.params)
    if parts.ways.in_backward and (grid is not None or parts.virtual):
        what = "a gradient is summed when all of it is there, and memory.optimizer_in_backward applies it before"
        raise RecipeError(what, fix="set memory.optimizer_in_backward=false", key="memory.optimizer_in_backward")
    if parts.virtual:
        tree = Tree(parts.params, parts.virtual)
        if grid is not None:
            group = grid.group("replicate")
            alike(parts.params, group)
            tree = Tree(parts.params, parts.virtual // grid.degrees.data, group, grid.data())
        return Steps(parts.scored, parts.params, optimizer, parts.ways, tree)
    if grid is None or grid.degrees.replicate * grid.degrees.context == 1:
        return Steps(parts.scored, parts.params, optimizer, parts.ways)
    team = Replicas(parts.scored, parts.params, grid.group("replicate", "context"), grid.data(), grid.peers.phase)
    return Steps(team.wrapped, parts.params, optimizer, parts.ways, team)


def alike(params: Mapping[str, nn.Parameter], group: Any) -> None:
    """Every rank has the first one's parameters: adapters begin at random; the rest is read from the same files."""
    for p in params.values():
        dist.broadcast(p.data, dist.get_global_rank(group, 0), group=group)


def _sum(group: Any, phase: Callable[[str], None], bucket: Any) -> Any:
    phase("reduce")
    work: Any = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
