"""The processes of a run as a group: gloo for what the host says, and the device's own library for tensors."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from llmkit.core.errors import LlmkitError, PeerError
from llmkit.core.folder import differences
from llmkit.core.peers import Apart, Peers
from llmkit.core.ranks import Ranks
from llmkit.core.runlog import NAME
from llmkit.core.wording import cut
from llmkit.parallel.apart import Sides, at_desk, gloo, training
from llmkit.parallel.rendezvous import GLOO, bound, store
from llmkit.parallel.watch import STACKS, Watch, is_lost, watching

HEAD, SIZE = 8192, 8
"""Bytes of a message that are sent at once, and those of them that say how many there are."""
EVER = timedelta(days=30)
"""How long a collective waits by itself: the watch ends it much earlier."""


class Group:
    """Implements `Peers` over torch.distributed, with a watch beside it."""

    def __init__(self, ranks: Ranks, watch: Watch, host: Any) -> None:
        self.ranks, self.watch, self.host = ranks, watch, host
        """`host`: a group of gloo of every rank, for small values that lie in the host's memory."""
        self.apart: Apart | None = None

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks: no pickle travels."""
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks.world)]
        self._wait(lambda: self.host.allgather(sizes, torch.tensor([len(raw)])))
        most = int(max(sizes))
        rooms, own = [torch.empty(most, dtype=torch.uint8) for _ in sizes], functional.pad(raw, (0, most - len(raw)))
        self._wait(lambda: self.host.allgather(rooms, own))
        return [json.loads(room[: int(size)].numpy().tobytes()) for room, size in zip(rooms, sizes, strict=True)]

    def share(self, value: Any) -> Any:
        """The main rank's JSON value."""
        return self.gather(value if self.ranks.main else None)[0]

    def tell(self, value: Any) -> Any:
        """The main rank's JSON value, which it sends to the others without hearing of them."""
        head, raw = torch.zeros(HEAD, dtype=torch.uint8), b""
        if self.ranks.main:
            raw = json.dumps(value).encode()
            told = len(raw).to_bytes(SIZE, "little") + raw[: HEAD - SIZE]
            head[: len(told)] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        self.spread(head, 0)
        size = int.from_bytes(head[:SIZE].numpy().tobytes(), "little")
        first = head[SIZE : SIZE + size].numpy().tobytes()
        if size <= HEAD - SIZE:
            return json.loads(first)
        rest = torch.empty(size - len(first), dtype=torch.uint8)
        if self.ranks.main:
            rest = torch.frombuffer(bytearray(raw[len(first) :]), dtype=torch.uint8)
        self.spread(rest, 0)
        return json.loads(first + rest.numpy().tobytes())

    def spread(self, tensor: Tensor, owner: int) -> None:
        """A tensor of rank `owner` in the place of those of the others, of one shape, in the host's memory."""
        self._wait(lambda: self.host.broadcast(tensor, owner))

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Around collectives of the device: one that fails raises who is to blame.

        Raises:
            LlmkitError: a rank is.
        """
        self.watch.check()
        try:
            yield
        except RuntimeError as cause:
            if is_lost(cause):
                raise self.watch.lost(cause) from cause
            raise

    def barrier(self, where: str) -> None:
        """Every rank is there when this returns."""
        self.phase(where)
        self.any("")

    def any(self, why: str) -> str:
        """The first reason that a rank gives, or nothing: the same on all of them."""
        flag = torch.tensor([int(bool(why))])
        self._wait(lambda: self.host.allreduce(flag, dist.ReduceOp.MAX))
        return next(filter(None, self.gather(why))) if int(flag) else ""

    def _wait(self, collective: Callable[[], Any]) -> None:
        """Does a collective; a signal's handler runs while it waits, and who is to blame ends it.

        Raises:
            LlmkitError: a rank is to blame.
        """
        where, pause = self.watch.where, 2e-5
        self.watch.check()
        where.count, where.waiting = where.count + 1, True
        try:
            work = collective()
            while not work.is_completed():
                self.watch.check()
                time.sleep(pause)
                pause = min(2e-3, pause * 1.5)
            work.wait()
        except RuntimeError as cause:
            raise self.watch.lost(cause) from cause
        finally:
            where.waiting = False

    def phase(self, name: str, step: int = 0) -> None:
        """Where this rank is now; step 0 is the one that it was in."""
        self.watch.where.tell(name, step)

    @contextmanager
    def alone(self, where: str) -> Iterator[None]:
        """Around work that the others wait for."""
        self.phase(where)
        self.watch.where.alone = True
        try:
            yield
        finally:
            self.watch.where.alone = False

    @contextmanager
    def at_work(self, folder: Path) -> Iterator[None]:
        """Around a stage: a fault of this rank is told to the others, theirs end it; stacks go to `folder`'s log."""
        with (folder / NAME).open("ab") as log, self._stacks(log):
            try:
                yield
            except BaseException as cause:
                if (other := self.watch.tell(cause)) is not None:
                    raise other from cause
                raise

    @contextmanager
    def _stacks(self, log: IO[bytes]) -> Iterator[None]:
        self.watch.log = log
        faulthandler.register(STACKS, log, all_threads=True)
        try:
            yield
        finally:
            faulthandler.register(STACKS, 2, all_threads=True)
            self.watch.log = None

    def closing(self, how: Callable[[LlmkitError], bool | None] | None) -> None:
        """What leaves the status of a stage where the main thread cannot."""
        self.watch.close = how


@contextmanager
def joined(
    ranks: Ranks,
    device: str,
    patience: float = 600.0,
    interface: str = "auto",
    facts: Mapping[str, Any] = {},
    serves: bool = False,
    own: socket.socket | None = None,
    aside: int = 0,
) -> Iterator[Group]:
    """The group of all ranks, until the end; `facts` are what they must share. `own`: the main rank's socket, where it
    listens already at the address that the others know. The last `aside` ranks do not train: torch's default group is
    of the others alone, and `apart` says how both talk.

    Ranks that serve wait for their main one as long as nothing is asked of it, which is no fault; and where one of them
    is to blame, the main one's next call raises it, and its process goes on. One that hangs is ended: the main one may
    wait for it where nothing but its end is heard.

    Raises:
        PeerError: they do not come together within `patience` seconds, or differ.
    """
    address, named = bound(interface, ranks.here < ranks.world)
    place = store(ranks, address, patience, own)
    before = os.environ.get(GLOO)
    if named:
        os.environ[GLOO] = named
    watch = watching(ranks, place, address, patience)
    try:
        yield from _grouped(ranks, device, place, watch, patience, facts, serves, aside)
        watch.leave()
    except BaseException as cause:
        if (other := watch.tell(cause)) is not None:
            raise other from cause
        if isinstance(cause, LlmkitError) and cause.speaks is None:
            cause.speaks = ranks.main  # all others know of it
        raise
    finally:
        watch.end()
        if before is None:
            os.environ.pop(GLOO, None)


def _grouped(
    ranks: Ranks,
    device: str,
    place: Any,
    watch: Watch,
    patience: float,
    facts: Mapping[str, Any],
    serves: bool,
    aside: int,
) -> Iterator[Group]:
    watch.gather()
    if serves:
        watch.serve()
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(ranks.local)
    if ranks.rank < ranks.world - aside:
        limit, world = timedelta(seconds=patience), ranks.world - aside
        hook = sys.excepthook  # torch puts one in its place that keeps what ours says until after our end
        dist.init_process_group(backend, store=place, rank=ranks.rank, world_size=world, timeout=limit)
        sys.excepthook = hook
    group = _sided(ranks, place, watch, aside) if aside else Group(ranks, watch, _host())
    agreed(group, facts)
    try:
        yield group
    except BaseException:
        if serves:  # the process goes on, and may be one of another group
            with suppress(RuntimeError):
                dist.destroy_process_group()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()  # after a fault others have left it, and it cannot be ended in good order


def _host() -> Any:
    return dist.new_group(backend="gloo", timeout=EVER)


def _sided(ranks: Ranks, place: Any, watch: Watch, aside: int) -> Group:
    """All ranks, of which the last `aside` do not train."""
    whole = own = Group(ranks, watch, gloo(place, "whole", ranks, EVER))
    here, trains = at_desk(ranks, aside), ranks.rank < ranks.world - aside
    desk = None if here is None else Group(here, watch, gloo(place, "desk", here, EVER))
    if trains:
        own = Group(training(ranks, aside), watch, _host())
    whole.apart = own.apart = Sides(trains, own, whole, desk)
    return whole


def agreed(peers: Peers, value: Mapping[str, Any], what: str = "") -> None:
    """Sees to it that all ranks say the same of `what`.

    Raises:
        PeerError: some do not; it names the first that differs, in what, and both values.
    """
    mark = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    if len(set(peers.gather(mark))) == 1:
        return
    said = peers.gather([peers.ranks.name, value])
    for name, other in said[1:]:
        for key, ours, theirs in differences(said[0][1], other):
            told = f"{name} has {what}{key} {_short(theirs)}, and {said[0][0]} has {_short(ours)}"
            raise PeerError(told, fix="give every rank the same code, recipe and data")


def _short(value: Any) -> str:
    return "none" if value is None else cut(str(value), 80)


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
