"""Ranks that need no process group: threads, and forked children that speak through files."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from llmkit.core.errors import PeerError
from llmkit.core.ranks import Ranks


class Threads:
    """Peers of one process: each rank is a thread."""

    def __init__(self, rank, world, meeting):
        self.ranks, self.meeting = Ranks(rank, world, rank, world), meeting

    def gather(self, value):
        barrier, said = self.meeting
        said[self.ranks.rank] = json.dumps(value)
        barrier.wait(20)
        found = [json.loads(one) for one in said]
        barrier.wait(20)
        return found

    def share(self, value):
        return self.gather(value)[0]

    def any(self, why):
        return next(filter(None, self.gather(why)), "")

    def barrier(self, where):
        self.gather(None)

    def phase(self, name, step=0):
        pass

    def alone(self, where):
        return nullcontext()


class Files(Threads):
    """Peers that are processes, forked by one parent; one that is dead is known to be."""

    def __init__(self, rank, world, folder):
        self.ranks, self.folder, self.turn = Ranks(rank, world, rank, world), folder, 0
        self._put(f"pid-{rank}", str(os.getpid()))

    def _put(self, name, text):
        (self.folder / f"aside-{name}").write_text(text)
        (self.folder / f"aside-{name}").rename(self.folder / name)

    def _dead(self, rank):
        path = self.folder / f"pid-{rank}"
        return path.exists() and " Z " in Path(f"/proc/{path.read_text()}/stat").read_text()

    def gather(self, value):
        self.turn += 1
        self._put(f"{self.turn}-{self.ranks.rank}", json.dumps(value))
        said, until = [], time.monotonic() + 20
        for rank in range(self.ranks.world):
            path = self.folder / f"{self.turn}-{rank}"
            while not path.exists():
                if time.monotonic() > until or (self._dead(rank) and not path.exists()):
                    raise PeerError(f"rank {rank} is gone")
                time.sleep(0.001)
            said.append(json.loads(path.read_text()))
        return said


def on_threads(world, work):
    """What `work(peers)` gives on each rank, or raises on it."""
    meeting = threading.Barrier(world), [""] * world
    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(work, Threads(rank, world, meeting)) for rank in range(world)]
        return [future.exception(60) or future.result() for future in futures]


def forked(world, work):
    """The exit codes of `work(rank)` in forked children; a signal's number is negative."""
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                work(rank)
                code = 0
            except PeerError:
                code = 6
            finally:
                os._exit(code)
        pids.append(pid)
    for pid in pids:  # a dead one stays a zombie until all are
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
