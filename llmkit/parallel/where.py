"""Where a rank is: what it tells the others of itself, many times a step."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

STEP = ("forward", "backward", "reduce", "step")
"""Phases that take about as long in every step."""
AGAIN = ("evaluate", "save", "log")
"""Phases outside of a step that come again and again, and take about as long as they did."""
DEPTH = 24
"""Frames of a stack that are told, innermost first."""
BUSY = 0.2
"""Of a processor, what the threads beside the main one use where they are at work and do not only look around."""
LIBRARY, TALK = re.compile(r"/(torch|deepspeed)/"), re.compile(r"/torch/(distributed|nn/parallel)/|/deepspeed/comm/")
"""Files of the libraries that talk with other ranks, and those of them that do it."""
WITHIN = re.compile(r"/(torch|deepspeed|llmkit)/")
"""Files of the libraries, and ours."""


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
        self._entered, self._longest = time.monotonic(), dict[str, float]()
        self._before = (time.monotonic(), 0.0)
        """When the other threads' use of processors was read last, and what it was."""
        self._main = threading.main_thread()

    def tell(self, phase: str, step: int = 0) -> None:
        """Enters a phase; step 0 is the one that it was."""
        now, step = time.monotonic(), step or self.step
        if self._began and (step != self.step or phase not in STEP):
            self._took.append(now - self._began)
            self._began = 0.0
        if phase == "data" and step:
            self._began = now
        if (phase, step) != (self.phase, self.step):
            if self.phase in AGAIN:
                self._longest[self.phase] = max(now - self._entered, self._longest.get(self.phase, 0.0))
            self._entered = now
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
        """All of it, as a JSON object; called by the thread that tells it."""
        frame = sys._current_frames().get(self._main.ident or 0)
        own = self._cpu()
        return self.place | {
            "cpu": own,
            "busy": self._busy(own),
            "usual": self._longest.get(self.phase),
            "inside": talks(frame) or (self.phase == "reduce" and within(frame)),
            "stack": stack(frame),
        }

    def _cpu(self) -> float:
        """Seconds of a processor that the main thread has used."""
        try:
            return time.clock_gettime(time.pthread_getcpuclockid(self._main.ident or 0))
        except OSError:
            return 0.0

    def _busy(self, own: float) -> bool:
        """Whether other threads than the main one and the caller's are at work, or any waits for a disk."""
        (then, before), now = self._before, time.monotonic()
        used = time.process_time() - time.thread_time() - own
        self._before = (now, used)
        return used - before > BUSY * (now - then) or "D" in states("self")


def states(pid: int | str) -> set[str]:
    """In one letter what the threads of a process of this host do: R runs or may run, D waits for a disk, S sleeps, T
    is stopped (Linux, proc(5))."""
    found = set()
    for file in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # it has ended
            found.add(file.read_text().rpartition(")")[2].split()[0])
    return found


def talks(frame: FrameType | None) -> bool:
    """Whether a stack ends in a library's talk with other ranks: it waits for them, or nearly."""
    while frame is not None and LIBRARY.search(frame.f_code.co_filename):
        if TALK.search(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


def within(frame: FrameType | None) -> bool:
    """Whether a stack ends in a library or here: where sums are made, it waits for them there, and nowhere else."""
    return frame is not None and WITHIN.search(frame.f_code.co_filename) is not None


def stack(frame: FrameType | None) -> list[str]:
    """FILE:LINE NAME of each frame, innermost first."""
    found: list[str] = []
    while frame is not None and len(found) < DEPTH:
        code = frame.f_code
        found.append(f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return found
