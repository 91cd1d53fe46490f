"""A child process that does not outlive the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from llmkit.core.errors import PeerError

PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when the thread that started it ends."""


def bound(parent: int) -> None:
    """From now on this process does not outlive the one that started it, not even where it stands still; elsewhere than
    on Linux it hears of it by its group, or by the end of its input."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before
        os._exit(PeerError.code)
