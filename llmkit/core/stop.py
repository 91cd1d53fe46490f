"""Asking a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGHUP set a flag that the loop reads between micro-batches, and
end at once what only reads.

A second signal changes nothing: the save under way ends, then the run exits 75. SIGKILL is the way to end it at once;
the last checkpoint stays whole.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from llmkit.core.errors import Stopped
from llmkit.core.peers import Peers

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """Why the run should stop, or nothing."""

    def __init__(self) -> None:
        self.why = ""
        self._interruptible = False
        self.agree: Callable[[str], str] | None = None
        """This process's reason -> that of the first of all ranks that has one, where they must stop at one place."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` and a shell's `&` mean what they say
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        first, self.why = not self.why, self.why or f"stopped by {signal.Signals(number).name}"
        if first and self._interruptible:
            raise KeyboardInterrupt  # no library takes it for a failure of its own, as it may an Exception

    def hear(self, why: str) -> None:
        """Another process of the run was asked to stop."""
        self.why = self.why or why

    @contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """For work that only reads and computes, and need not be brought to an end: a signal ends it where it is.

        Raises:
            Stopped: someone asked.
        """
        self.check(where)
        self._interruptible = self.agree is None
        try:
            yield
        except KeyboardInterrupt:
            self.check(where)
            raise
        finally:
            self._interruptible = False

    @contextmanager
    def together(self, peers: Peers) -> Iterator[None]:
        """Inside, all ranks of a run stop at one place or none does: each asks as often as the others."""
        self.agree = peers.any if peers.ranks.world > 1 else None
        try:
            yield
        finally:
            self.agree = None

    def asked(self) -> str:
        """Why the run should stop, or nothing; the same on all ranks that must agree."""
        if self.agree is None:
            return self.why
        agreed = self.agree(self.why)
        self.why = agreed or self.why  # a signal that came meanwhile is said the next time
        return agreed

    def check(self, where: str) -> None:
        """Raises:
        Stopped: someone asked.
        """
        if why := self.asked():
            raise Stopped(f"{why} {where}", fix="run the same command again to go on")
