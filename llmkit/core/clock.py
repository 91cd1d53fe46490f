"""The time of day, to tell somebody when something was: nothing is measured by it, since it can leap."""

from __future__ import annotations

import time


def now() -> float:
    """Seconds since the epoch."""
    return time.time()
