"""The processes of a run as a group: gloo for what the host says, and the device's own library for tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llmkit.core.errors import LlmkitError, PeerError
from llmkit.core.peers import Peers
from llmkit.core.ranks import Ranks

PATIENCE = timedelta(minutes=30)
"""How long a collective waits by itself; who watches the ranks ends it much earlier."""


class Group:
    """Implements `Peers` over torch.distributed."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.host = dist.new_group(backend="gloo", timeout=PATIENCE)
        """Of every rank, for small values that lie in the host's memory."""

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks: no pickle travels."""
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks.world)]
        dist.all_gather(sizes, torch.tensor([len(raw)]), group=self.host)
        most = int(max(sizes))
        rooms = [torch.empty(most, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(rooms, torch.nn.functional.pad(raw, (0, most - len(raw))), group=self.host)
        return [json.loads(room[: int(size)].numpy().tobytes()) for room, size in zip(rooms, sizes, strict=True)]

    def share(self, value: Any) -> Any:
        """The main rank's JSON value."""
        return self.gather(value if self.ranks.main else None)[0]

    def barrier(self, where: str) -> None:
        """Every rank is there when this returns."""
        self.phase(where)
        dist.barrier(group=self.host)

    def any(self, why: str) -> str:
        """The first reason that a rank gives, or nothing: the same on all of them."""
        flag = torch.tensor([int(bool(why))])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.host)
        return next(filter(None, self.gather(why))) if int(flag) else ""

    def phase(self, name: str, step: int = 0) -> None:
        """Nobody watches yet."""

    @contextmanager
    def alone(self, where: str) -> Iterator[None]:
        """Around work that the others wait for."""
        self.phase(where)
        yield


@contextmanager
def joined(ranks: Ranks, device: str) -> Iterator[Group]:
    """The group of all ranks, until the end.

    Raises:
        PeerError: they do not come together.
    """
    backend = f"cpu:gloo,cuda:{'nccl' if device == 'cuda' else 'gloo'}" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(ranks.local)
    try:
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as cause:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        what = f"{ranks.name} cannot join the {ranks.world} ranks at {where} ({str(cause).splitlines()[0]:.200})"
        raise PeerError(what, fix="start all ranks by one launcher") from cause
    group = Group(ranks)
    try:
        yield group
    except LlmkitError:
        raise
    finally:
        dist.destroy_process_group()


def agreed(peers: Peers, value: Any, what: str) -> None:
    """Sees to it that all ranks say the same of `what`.

    Raises:
        PeerError: some do not; it names the first that differs, and both values.
    """
    said = peers.gather([peers.ranks.name, value])
    for name, other in said[1:]:
        if other != said[0][1]:
            raise PeerError(
                f"{name} has {what} {other}, and {said[0][0]} has {said[0][1]}",
                fix="give every rank the same code, recipe and data",
            )


def lead(peers: Peers, first: bool) -> AbstractContextManager[None]:
    """Ranks with `first` do what is inside before the others: they leave what those find."""

    @contextmanager
    def turn() -> Iterator[None]:
        if not first:
            peers.barrier("data")
        yield
        if first:
            peers.barrier("data")

    return turn()
