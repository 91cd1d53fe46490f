"""Ranks that do not train beside those that do, in groups of their own: no collective of training knows of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from llmkit.core.peers import Peers, Whole
from llmkit.core.ranks import Ranks


@dataclass(frozen=True)
class Sides:
    """Implements `Apart`."""

    trains: bool
    own: Peers
    whole: Whole
    desk: Peers | None


def training(ranks: Ranks, aside: int) -> Ranks:
    """One of the ranks that train, among these: the last `aside` are not among them, but share their host's memory."""
    return replace(ranks, world=ranks.world - aside)


def at_desk(ranks: Ranks, aside: int) -> Ranks | None:
    """The main rank or one that does not train, among these alone; None of the others."""
    train = ranks.world - aside
    place = 0 if ranks.main else ranks.rank - train + 1
    return Ranks(place, aside + 1, place, aside + 1) if place > 0 or ranks.main else None


def gloo(store: Store, name: str, ranks: Ranks, wait: timedelta) -> Any:
    """A group of gloo that torch does not count among those of the default group: that one may have fewer ranks."""
    kind: Any = vars(dist)["ProcessGroupGloo"]
    return kind(PrefixStore(f"aside/{name}", store), ranks.rank, ranks.world, wait)
