"""Where a rank is: what it tells the others of itself, many times a step."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

STEP = ("forward", "backward", "reduce", "step")
"""Phases that take about as long in every step."""
DEPTH = 24
"""Frames of a stack that are told, innermost first."""


class Where:
    """The main thread writes; another reads, at any moment."""

    def __init__(self) -> None:
        self.phase, self.step = "start", 0
        self.count = 0
        """Grows with everything that is done: of two ranks in one phase, the lower is behind."""
        self.waiting = False
        """For the others, in a collective."""
        self.alone = False
        """At work that the others wait for."""
        self.heard: Callable[[], None] = lambda: None
        """Tells the others at once that it has moved."""
        self._took: deque[float] = deque(maxlen=101)
        self._began = 0.0
        self._main = threading.main_thread()

    def tell(self, phase: str, step: int = 0) -> None:
        """Enters a phase; step 0 is the one that it was."""
        now, step = time.monotonic(), step or self.step
        if self._began and (step != self.step or phase not in STEP):
            self._took.append(now - self._began)
            self._began = 0.0
        if phase == "data" and step:
            self._began = now
        self.phase, self.step = phase, step
        self.count += 1
        self.heard()

    @property
    def median(self) -> float | None:
        """Seconds of a step; None where there was none yet."""
        took = list(self._took)
        return median(took) if took else None

    @property
    def place(self) -> dict[str, Any]:
        """The part of it that changes many times a step."""
        return {name: getattr(self, name) for name in ("phase", "step", "count", "waiting", "alone")}

    def said(self) -> dict[str, Any]:
        """All of it, as a JSON object."""
        return self.place | {"cpu": self._cpu(), "stack": stack(sys._current_frames().get(self._main.ident or 0))}

    def _cpu(self) -> float:
        """Seconds of a processor that the main thread has used."""
        try:
            return time.clock_gettime(time.pthread_getcpuclockid(self._main.ident or 0))
        except OSError:
            return 0.0


def stack(frame: FrameType | None) -> list[str]:
    """FILE:LINE NAME of each frame, innermost first."""
    found: list[str] = []
    while frame is not None and len(found) < DEPTH:
        code = frame.f_code
        found.append(f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return found
