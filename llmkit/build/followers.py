"""The processes of the other ranks that hold a model: started by the first one, and never left behind by it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, Protocol

from llmkit.core.errors import PeerError
from llmkit.core.ranks import Ranks

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
    """A new interpreter, which is told by a line on its standard input."""
    environment = os.environ | rank.environment(port) | {"OMP_NUM_THREADS": str(said["threads"])}
    command, pipe = [sys.executable, "-m", "llmkit.build.rank", str(os.getpid())], subprocess.PIPE
    made = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
    if made.stdin is not None:
        with suppress(BrokenPipeError):  # it has ended; whoever waits for it says so
            made.stdin.write(json.dumps(said).encode() + b"\n")
            made.stdin.close()
    return made


class Followers:
    """Ranks 1 to `world` - 1. A thread starts them and lives as long as they do: the system ends a rank together with
    the thread that started it, however that comes to its end (`rank.py:bound`)."""

    def __init__(self, world: int, port: int, said: dict[str, Any], start: Start) -> None:
        self.world, self.ended = world, False
        self.children: list[Process] = []
        self.failed: OSError | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(port, said, start), daemon=True, name="followers")
        self._thread.start()
        self._started.wait()

    def _keep(self, port: int, said: dict[str, Any], start: Start) -> None:
        try:
            for rank in range(1, self.world):
                self.children.append(start(Ranks(rank, self.world, rank, self.world), port, said))
        except OSError as cause:
            self.failed = cause
        finally:
            self._started.set()
        for child in self.children:
            child.wait()

    def ready(self, patience: float = PATIENCE) -> None:
        """Waits until all are ready to come.

        Raises:
            PeerError: one could not be started, ended, or is not ready in time.
        """
        if self.failed is not None:
            what = f"another rank cannot be started ({self.failed.strerror or self.failed})"
            raise PeerError(what, fix="free some memory or processes", key="tensor") from self.failed
        until = time.monotonic() + patience
        for rank, child in enumerate(self.children, 1):
            out = child.stdout
            if out is None or not select.select([out], [], [], max(0.0, until - time.monotonic()))[0]:
                what = f"rank {rank} (pid {child.pid}) was not ready in {patience:.0f} s"
                raise PeerError(what, fix="try again on a machine with less to do", key="tensor")
            if not out.readline():
                what = f"rank {rank} ended as it began, with status {child.wait()}"
                raise PeerError(what, fix="look at what it said above", key="tensor")
            out.close()

    def end(self, seconds: float = GRACE) -> None:
        """All of them are gone when this returns; those that do not end by themselves in time are ended."""
        until = time.monotonic() + seconds
        for child in self.children if not self.ended else ():
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self.ended = True
