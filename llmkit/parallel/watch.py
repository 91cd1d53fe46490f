"""The watch beside the collectives: one thread a rank that tells where the rank is, hears who is to blame, and ends it.

A rank that sits in a collective cannot be asked: gloo waits for a peer that is gone, and a signal's handler waits for
gloo. So each rank has a connection of its own to the main one. When someone is to blame, the main thread is left a
moment to end by itself (it does where it waits for values, see `Group`); if it does not, this thread leaves the status
and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import re
import select
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

from torch.distributed.distributed_c10d import Store

from llmkit.core.errors import LlmkitError, PeerError, Stopped, without_logins
from llmkit.core.ranks import Ranks, exit_status
from llmkit.parallel.judge import AGAIN, OPEN, Verdict
from llmkit.parallel.posts import Hub, Post, Spoke
from llmkit.parallel.rendezvous import FIX, told
from llmkit.parallel.where import Where

KEY = "watch"
"""Of the store: where the main rank listens."""
BEAT = 0.5
"""Seconds between signs of life; longer where there are hundreds of ranks, which all tell one."""
TURN = 0.02
"""Seconds between looks at what has come: phases change more often than it matters."""
GAP = 2.0
"""Seconds late that show that this process itself was stopped."""
MOMENT = 1.0
"""Seconds that the main thread has to begin to end by itself."""
ENDING = 5.0
"""Seconds that it has to end then."""
STACKS = signal.SIGUSR2
"""Writes the stacks of a process into its run log, also where Python itself stands still."""
LOST = re.compile(r"gloo|NCCL|ProcessGroup|TCPStore|onnection (closed|reset|refused)|Broken pipe|DistNetworkError")

Close = Callable[[LlmkitError], bool | None]


class Watch:
    """One rank's thread, and what the rank's main thread says to it."""

    def __init__(self, ranks: Ranks, where: Where, post: Post) -> None:
        self.ranks, self.where, self.post = ranks, where, post
        self.close: Close | None = None
        """Leaves the status for the main thread, if that cannot; says whether it was there to be left, None where a
        process that lives holds it."""
        self.serving = False
        """The main rank's process is another's: it is told and not ended."""
        self.log: IO[bytes] | None = None
        self.found: Verdict | None = None
        self.known = threading.Event()
        """Somebody is to blame, and all that this thread says of it is said."""
        self._raised: LlmkitError | None = None
        """What it gave the main thread to end by."""
        self._leaving, self._left, self._last_words = threading.Event(), threading.Event(), threading.Lock()
        self._todo, (self._wake, self._bell) = SimpleQueue[Callable[[], None]](), socket.socketpair()
        self._bell.setblocking(False)
        watch = weakref.ref(self)  # a fork would keep up the connection of a rank that died
        os.register_at_fork(after_in_child=lambda: _forked(watch))
        faulthandler.register(STACKS, 2, all_threads=True)
        where.heard = post.moved
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    # what the main thread calls

    def gather(self) -> None:
        """Waits for all ranks.

        Raises:
            PeerError: some did not come.
        """
        while not self.post.complete:
            self.check()
            time.sleep(0.01)

    def serve(self) -> None:
        """Ranks wait for each other without end from now on, and the main one's process is left alone."""
        self.post.patient()
        self.serving = self.ranks.main

    def check(self) -> None:
        """Raises:
        LlmkitError: someone is to blame.
        """
        if self.known.is_set():
            raise self._error()

    def tell(self, cause: BaseException) -> LlmkitError | None:
        """The main thread ends by `cause`, which the others hear; gives what ends it where they are to blame."""
        if cause is self._raised:
            return None
        if is_lost(cause):
            return self.lost(cause)
        code = cause.code if isinstance(cause, LlmkitError) else 75 if isinstance(cause, KeyboardInterrupt) else 1
        lines = tuple(map(str, cause.problems)) if isinstance(cause, LlmkitError) else (_own(cause),)
        self._ask(lambda: self.post.fault(code, lines, time.monotonic()))
        return self._blamed()

    def lost(self, cause: BaseException) -> LlmkitError:
        """A collective failed: the error that says why."""
        if (found := self._blamed()) is not None:
            return found
        why = next(iter(str(cause).splitlines()), "")
        own = self._raised = PeerError(f"the ranks have lost each other ({why:.160})", fix=self._fix)
        self._ask(lambda: self.post.fault(own.code, (str(own),), time.monotonic()))
        return self._blamed() or own

    def leave(self) -> None:
        """This rank is done, and the others know or hear it."""
        if not self.known.is_set():
            self._ask(self.post.leave)
            self._thread.join(ENDING)

    def end(self) -> None:
        """The main thread has left the group, well or by an error: it needs nobody to end it any more."""
        self._left.set()

    def _blamed(self) -> LlmkitError | None:
        """The verdict's error, where it comes soon and is not about this rank itself; the main thread ends now."""
        self.known.wait(ENDING)
        self._leave()
        return self._error() if self.found is not None and self.found.rank != self.ranks.rank else None

    def _leave(self) -> None:
        self._leaving.set()
        with self._last_words:  # never given back by a thread that is ending the process
            return

    @property
    def _fix(self) -> str:
        return OPEN if self.serving else AGAIN

    def _error(self) -> LlmkitError:
        self._leave()
        fix, found = self._fix, self.found
        self._raised = found.error(fix) if found is not None else PeerError("the watch has ended", fix=fix)
        self._raised.speaks = None if self.serving else self.found is None
        return self._raised

    def _ask(self, what: Callable[[], None]) -> None:
        self._todo.put(what)
        with suppress(OSError):
            self._wake.send(b".")

    # the thread

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException:
            self.known.set()  # a fault of its own: the main thread waits for no word of it
            raise

    def _watch(self) -> None:
        beat = BEAT * max(1.0, min(4.0, self.ranks.world / 128))
        last = told = time.monotonic()
        self.post.beat(last)
        while True:
            self._listen(max(0.0, told + beat - last))
            time.sleep(TURN)
            now = time.monotonic()
            if now - last > GAP:
                self.post.forgive(now)
            last = now
            self._do()
            if now - told >= beat:
                told = now
                self.post.beat(now)
            self.found = self.post.turn(now)
            if self.found is not None:
                self._end(self.found)
                return
            if self.post.over:
                break
        self.post.close()

    def _listen(self, seconds: float) -> None:
        """Until something comes, or it is time for a beat."""
        poll = select.poll()
        for each in (*self.post.sockets(), self._bell):
            if each.fileno() >= 0:
                poll.register(each, select.POLLIN)
        poll.poll(1000 * min(0.2, seconds))

    def _do(self) -> None:
        with suppress(OSError):
            self._bell.recv(4096)
        with suppress(Empty):
            while True:
                self._todo.get_nowait()()

    def _end(self, found: Verdict) -> None:
        """Everyone knows; the main thread ends, or the process does."""
        self.post.end(found)
        mine = found.rank == self.ranks.rank and not found.hangs
        if self.serving:
            self.known.set()
            if found.hangs and found.pid != self.ranks.pid and found.host == host():
                with suppress(OSError):  # the main thread may wait for it in a sum that nothing else ends
                    os.kill(found.pid, signal.SIGKILL)
            return
        try:
            if not mine:
                self._speak(found)
                self._show_stacks(found)
        finally:
            self.known.set()
        if not self._leaving.wait(MOMENT):
            with self._last_words:
                if not self._leaving.is_set():
                    try:
                        if self.close is not None and self.ranks.main:
                            self.close(found.error())
                    finally:
                        self._exit(found)
        if not self._left.wait(ENDING * (4 if mine else 1)):
            self._exit(found)

    def _speak(self, found: Verdict) -> None:
        """One of those that are left says it; for a main rank that cannot, it leaves the status too."""
        before = self.post.speaks(found)
        if before < 0:
            return
        time.sleep(min(3.0, 0.3 * before))
        left = None
        if self.post.orphan and self.close is not None:
            with suppress(OSError, LlmkitError):  # a disk that refuses; the line is said anyway
                left = self.close(found.error())
        if left or (left is None and before == 0):
            with suppress(OSError):  # not by Python's own stream: the main thread may hold it
                os.write(2, "".join(f"llmkit: error: {line}\n" for line in map(str, found.error().problems)).encode())

    def _show_stacks(self, found: Verdict) -> None:
        """Of this rank; and of one that hangs here, which cannot do it by itself."""
        if self.log is not None and found.code != Stopped.code:
            with suppress(OSError, ValueError):
                self.log.write(f"watch: {found.lines[0]}\n".encode())
                self.log.flush()
                faulthandler.dump_traceback(self.log, all_threads=True)
        if found.hangs and found.pid != self.ranks.pid and found.host == host():
            with suppress(OSError):
                os.kill(found.pid, STACKS)

    def _exit(self, found: Verdict) -> None:
        flushing = threading.Thread(
            target=_flush, daemon=True
        )  # the main thread may hold the streams, and never let go
        flushing.start()
        flushing.join(1.0)
        os._exit(exit_status(found.code))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def watching(ranks: Ranks, place: Store, address: str, patience: float) -> Watch:
    """Begins: the main rank listens at `address` and says in the store where; the others come to it.

    Raises:
        PeerError: the main rank did not come.
    """
    where = Where()
    if ranks.main:
        hub = Hub(ranks, where, host(), address, patience)
        place.set(KEY, json.dumps(hub.address | {"name": ranks.name, "node": host(), "pid": ranks.pid}))
        return Watch(ranks, where, hub)
    said = told(place, KEY, ranks, patience)
    try:
        return Watch(ranks, where, Spoke(ranks, where, host(), said, patience))
    except OSError as cause:
        what = (
            f"{ranks.name} does not reach {said['name']} at {said['host']}:{said['port']} ({cause.strerror or cause})"
        )
        raise PeerError(what, fix=FIX) from cause


def host() -> str:
    """This host, and which processes are known here by which number."""
    with suppress(OSError):
        return f"{platform.node()} {Path('/proc/self/ns/pid').readlink()}"
    return platform.node()


def is_lost(cause: BaseException | None) -> bool:
    """Whether an error comes of a collective that failed."""
    while cause is not None:
        if isinstance(cause, RuntimeError) and LOST.search(f"{type(cause).__name__} {cause}"):
            return True
        cause = cause.__cause__
    return False


def _own(cause: BaseException) -> str:
    """What nobody foresaw, in a line."""
    if isinstance(cause, KeyboardInterrupt):
        return f"was interrupted; fix: {AGAIN}"
    why = next(iter(str(cause).strip().splitlines()), "")
    return without_logins(
        f"met a fault of its own ({type(cause).__name__}: {why}); fix: run again with --debug and report it"
    )


def _forked(watch: weakref.ref[Watch]) -> None:
    """In a child: it is no rank."""
    found = watch()
    if found is not None:
        found.post.close()
        found.known.set()
