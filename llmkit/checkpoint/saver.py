"""Saving beside the work of the loop, by one process or by all ranks of a run.

The loop waits for a copy of what its rank is to write. A thread then hashes it, writes it and, on the main rank,
publishes the checkpoint when the files of all ranks are there, and takes the old ones away.

**How the ranks speak meanwhile: through files.** A collective of the thread would meet those of the step on their
group, in another order on each rank, and hang; a group of its own would not, but a rank that dies in it leaves the
others in a call that nothing but its time limit ends, and a thread in such a call cannot be ended. So each rank leaves
a word in the folder beside its file (`.done-R`: its sha256, or why there is none), and the main rank's thread looks for
them; it gives up when the files have not grown for `PATIENCE`, or when a rank is known to have failed. This asks for
nothing that the checkpoint itself does not: that all ranks see one folder. What came of a save is agreed by the loop's
own thread, over the run's group, where all ranks are at one place anyway: at the next save and at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from llmkit.checkpoint import state
from llmkit.checkpoint.agree import agree, as_json, from_json
from llmkit.checkpoint.deal import Layout, Whole, deal, layout
from llmkit.checkpoint.draft import Draft, token
from llmkit.checkpoint.manifest import part
from llmkit.checkpoint.mirror import Mirror
from llmkit.core.errors import LlmkitError, PeerError, Stopped
from llmkit.core.files import DISK, Disk
from llmkit.core.peers import Alone, Peers
from llmkit.core.sliced import State, whole

PATIENCE = 600.0
"""Seconds without a new byte after which a rank's writing is not waited for."""
HURRY = 3.0
"""The same when the run is ending by a fault."""
GLANCE = 0.02
"""Seconds between two looks."""
SIGN = 1.0
"""Seconds between two looks of the loop's own thread, which waits for the writing one: it uses no processor, and says
that it gets on as long as bytes do."""


@dataclass(frozen=True)
class Keep:
    """What of a save is its own: which checkpoints stay after it, and what must be on the disk before it."""

    newest: int
    best: int | None = None
    first: Sequence[Callable[[], None]] = ()


@dataclass(frozen=True)
class Pending:
    """A save under way."""

    draft: Draft
    mine: Future[str]
    """The file of this rank."""
    all: Future[None]
    """On the main rank, the publication; on the others nothing."""
    ending: Event
    """The run ends by a fault."""
    given_up: Event
    """A rank is known to have failed."""


class Saver:
    """Saves into a folder, one after the other. All ranks call `save` and `wait` alike. A block of it ends when nothing
    is under way any more; where it ends by an error that is not `Stopped`, no rank waits for the others."""

    def __init__(
        self,
        folder: Path,
        say: Callable[[str], None],
        peers: Peers | None = None,
        background: bool = True,
        mirror: Mirror | None = None,
        disk: Disk = DISK,
    ) -> None:
        self.folder, self.say, self.peers = folder, say, peers or Alone()
        self.background, self.mirror, self.disk = background, mirror, disk
        self.worker = ThreadPoolExecutor(1, "llmkit-save")
        self.pending: Pending | None = None
        self.rooms: dict[str, Tensor] = {}
        self.known: Layout | None = None
        self.dealt: dict[str, Whole] = {}

    def __enter__(self) -> Saver:
        self.worker.submit(int)  # the thread is there before memory may be short
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None or issubclass(kind, Stopped):
                self.wait()
            else:
                self._let_go()
        finally:
            self.worker.shutdown()
            if self.mirror is not None:
                self.mirror.end(kind is not None, partial(self.peers.phase, "save"))

    def save(self, step: int, tensors: State, facts: Mapping[str, Any], keep: Keep) -> None:
        """Begins to publish `step-N`, when the save before is done; what is given may change when this returns.

        Raises:
            ResourceError: the save before failed, or there is no room for this one; older checkpoints are untouched.
            PeerError: the ranks do not hold one state.
        """
        self.wait()
        self.peers.phase("save", step)
        rank, text = self.peers.ranks.rank, state.facts_text(facts)
        draft = self._begun(step, tensors)
        own = {name: one for name, one in draft.tensors.items() if any(block.rank == rank for block in one.blocks)}
        held = {name: whole(tensors[name]).tensor.detach() for name in own}
        if self.background:
            held = self._copied(held)
        ending, given_up = Event(), Event()
        mine = self.worker.submit(self._write, draft, held, keep.first)
        everything = self.worker.submit(self._publish, draft, mine, text, keep, ending, given_up)
        self.pending = Pending(draft, mine, everything, ending, given_up)
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Until the save under way is published.

        Raises:
            LlmkitError: it failed, on any rank; it says where. What was written of it is gone.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            fault = self._outcome(pending.mine, pending.draft)
            try:
                agree(self.peers, fault)
            except BaseException:
                pending.given_up.set()
                raise
            agree(self.peers, self._outcome(pending.all, pending.draft))
        except BaseException:
            pending.all.exception()
            if self.peers.ranks.main:
                pending.draft.drop()
            raise

    def _outcome(self, writing: Future[Any], draft: Draft) -> BaseException | None:
        """What went wrong in the thread, when it is done; until then the other ranks hear that this one gets on."""
        size = 0
        while not futures.wait([writing], SIGN).done:
            with suppress(OSError):  # a file of it is gone, or has another name by now
                if (now := draft.written()) != size:
                    size = now
                    self.peers.phase("save", draft.step)
        return writing.exception()

    def _let_go(self) -> None:
        """Ends what is under way where the run ends by a fault: that is the one to raise, and peers may be gone."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        pending.ending.set()
        fault = pending.mine.exception() or pending.all.exception()
        if fault is not None:
            if self.peers.ranks.main:
                pending.draft.drop()
            self.say(f"step {pending.draft.step} is not saved: {fault}")

    def _begun(self, step: int, tensors: State) -> Draft:
        """Agrees with the others on who writes what, and where."""
        held = layout(tensors)
        if self.peers.any("" if held == self.known else "another layout"):
            self.dealt = deal(self.peers.gather(held))
            self.known = held
        chance = self.peers.share(token())
        draft = Draft(self.folder, step, self.dealt, self.peers.ranks.world, chance, self.disk)
        fault: LlmkitError | None = None
        if self.peers.ranks.main:
            try:
                draft.begin()
            except LlmkitError as cause:
                fault = cause
        agree(self.peers, fault)
        return draft

    def _copied(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy in the host's memory, in the room of the copy before: fresh memory costs as much as the copy."""
        rooms = {}
        for name, tensor in held.items():
            room = self.rooms.get(name)
            if room is None or (room.shape, room.dtype) != (tensor.shape, tensor.dtype):
                room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            room.copy_(tensor, non_blocking=True)
            rooms[name] = room
        if any(tensor.is_cuda for tensor in held.values()):
            torch.cuda.synchronize()
        self.rooms = rooms
        return rooms

    def _write(self, draft: Draft, held: Mapping[str, Tensor], first: Sequence[Callable[[], None]]) -> str:
        """In the thread: the file of this rank, and the word for the main one."""
        rank, name = self.peers.ranks.rank, self.peers.ranks.name
        try:
            for call in first:
                call()
            digest = draft.write(rank, held)
            if rank:
                draft.note(rank, {"sha256": digest})
        except BaseException as cause:
            if rank:
                with suppress(LlmkitError):  # it comes to light at the next save, where the ranks agree
                    draft.note(rank, as_json(cause, name))
            raise
        return digest

    def _publish(
        self, draft: Draft, mine: Future[str], text: bytes, keep: Keep, ending: Event, given_up: Event
    ) -> None:
        """In the thread: the whole, by the main rank."""
        if not self.peers.ranks.main:
            return
        digests = {part(0, draft.world): mine.result()}
        for rank in range(1, draft.world):
            digests[part(rank, draft.world)] = _awaited(draft, rank, ending, given_up)
        draft.publish(digests, text)
        if self.mirror is None:
            state.prune(self.folder, keep.newest, keep.best, self.disk)
            return
        with self.mirror.still() as busy:
            state.prune(self.folder, keep.newest, keep.best, self.disk, busy)
        self.mirror.send(draft.step)


def _awaited(draft: Draft, rank: int, ending: Event, given_up: Event) -> str:
    """The sha256 of another rank's file, when it is whole.

    Raises:
        LlmkitError: that rank failed, or has not written for too long.
    """
    size, since = -1, time.monotonic()
    while not given_up.is_set():
        said = draft.noted(rank)
        if said is not None:
            if "sha256" not in said:
                raise from_json(dict(said))
            return str(said["sha256"])
        with suppress(FileNotFoundError):
            if (now := draft.written()) != size:
                size, since = now, time.monotonic()
        patience = HURRY if ending.is_set() else PATIENCE
        if time.monotonic() - since > patience:
            break
        time.sleep(GLANCE)
    raise PeerError(
        f"saving {draft.final} failed: rank {rank} has not written its part", fix="run the same command again"
    )
