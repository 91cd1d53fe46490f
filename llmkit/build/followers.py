"""The processes of the other ranks that hold a model: started by the first one, and never left behind by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import IO, Any, Protocol

from llmkit.core.errors import PeerError
from llmkit.core.ranks import Ranks
from llmkit.core.readable import readable

PATIENCE = 120.0
"""Seconds for a rank to come, and for a sum over all of them."""
GRACE = 10.0
"""Seconds for a rank to end by itself."""


class Process(Protocol):
    """What runs a rank."""

    pid: int
    stdout: IO[bytes] | None
    """Where it writes a line when it is ready to come."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; `subprocess.TimeoutExpired` when it has none in time."""
        ...

    def kill(self) -> None:
        """Ends it."""
        ...


Start = Callable[[Ranks, int, dict[str, Any]], Process]
"""A rank, the port of the first one, and what it is told -> its process."""


def spawn(rank: Ranks, port: int, said: dict[str, Any]) -> Process:
    """A new interpreter, told by a line on its standard input. A thread starts it and lives as long as it does: the
    system ends a rank together with the thread that started it, however that comes to its end (`core/lifeline.py`)."""
    made: Future[subprocess.Popen[bytes]] = Future()

    def keep() -> None:
        try:
            child = _interpreter(rank, port, said)
        except OSError as cause:
            made.set_exception(cause)
            return
        made.set_result(child)
        child.wait()

    threading.Thread(target=keep, daemon=True, name=f"rank {rank.rank}").start()
    return made.result()


def _interpreter(rank: Ranks, port: int, said: dict[str, Any]) -> subprocess.Popen[bytes]:
    environment = os.environ | rank.environment(port) | {"OMP_NUM_THREADS": str(said["threads"])}
    command, pipe = [sys.executable, "-m", "llmkit.build.rank", str(os.getpid())], subprocess.PIPE
    made = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
    if made.stdin is not None:
        with suppress(BrokenPipeError):  # it has ended; whoever waits for it says so
            made.stdin.write(json.dumps(said).encode() + b"\n")
            made.stdin.close()
    return made


class Followers:
    """Ranks 1 to `world` - 1."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.children: list[Process] = []

    def begin(self, port: int, said: dict[str, Any], start: Start) -> None:
        """Starts all of them.

        Raises:
            PeerError: one could not be started.
        """
        try:
            for rank in range(1, self.world):
                self.children.append(start(Ranks(rank, self.world, rank, self.world), port, said))
        except OSError as cause:
            what = f"another rank cannot be started ({cause.strerror or cause})"
            raise PeerError(what, fix="free some memory or processes", key="tensor") from cause

    def ready(self, patience: float = PATIENCE) -> None:
        """Waits until all are ready to come.

        Raises:
            PeerError: one ended, or is not ready in time.
        """
        until = time.monotonic() + patience
        for rank, child in enumerate(self.children, 1):
            out = child.stdout
            if out is None or not readable(out, until - time.monotonic()):
                what = f"rank {rank} (pid {child.pid}) was not ready in {patience:.0f} s"
                raise PeerError(what, fix="try again on a machine with less to do", key="tensor")
            if not out.readline():
                what = f"rank {rank} ended as it began, with status {child.wait()}"
                raise PeerError(what, fix="look at what it said above", key="tensor")
            out.close()

    def end(self, seconds: float = GRACE) -> None:
        """All of them are gone when this returns; those that do not end by themselves in time are ended."""
        until = time.monotonic() + seconds
        for child in self.children:
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
