"""Asking a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGHUP set a flag that the loop reads between micro-batches.

A second signal changes nothing: the save under way ends, then the run exits 75. SIGKILL is the way to end it at once;
the last checkpoint stays whole.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from llmkit.core.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """Why the run should stop, or nothing."""

    def __init__(self) -> None:
        self.why = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.why = self.why or f"stopped by {signal.Signals(number).name}"

    def check(self, where: str) -> None:
        """Raises:
        Stopped: someone asked.
        """
        if self.why:
            raise Stopped(f"{self.why} {where}", fix="run the same command again to go on")
