"""What ranks tell each other every few seconds of a run: how fast each one is, and whether somebody wants a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmkit.core.run import Run
from llmkit.parallel.pace import Judge, Pace
from llmkit.stages.profiled import Profiled, asked

SECONDS = 5.0
"""Between two reports, about."""
MOST = 50
"""Steps between two reports."""


class Pulse:
    """One rank's; every rank calls it alike."""

    def __init__(self, run: Run, write: Callable[[dict[str, Any]], None]) -> None:
        self.run, self.write = run, write
        self.pace, self.judge = Pace(run.device), Judge()
        self.profiled = Profiled(run.folder, run.ranks.rank, run.device, run.console.notice)
        self._due = 0
        self._slow: dict[tuple[int, str], dict[str, Any]] = {}

    def phase(self, name: str, step: int = 0) -> None:
        """Where the loop is now."""
        self.pace.phase(name)
        self.run.peers.phase(name, step)

    def stepped(self, step: int, seconds: float) -> None:
        """A step is over and its line is written: when it is time, reports are exchanged."""
        self.profiled.stepped()
        if step < self._due:
            return
        mine = {"name": self.run.ranks.name, "seconds": seconds, **self.pace.taken()}
        told = self.run.peers.gather(mine | {"trace": asked(self.run.folder) if self.run.main else 0})
        slowest = max(one["seconds"] for one in told)
        self._due = step + max(1, min(MOST, int(SECONDS / max(slowest, 1e-9))))
        self._tell(step, self.judge.slow(told))
        if trace := told[0]["trace"]:
            self.profiled.begin(step, trace)

    def _tell(self, step: int, slow: list[dict[str, Any]]) -> None:
        """A line and a notice when a rank begins to be slow, and when it no longer is."""
        before, here = self._slow, {(one["rank"], one["what"]): one for one in slow}
        self._slow = here
        if not self.run.main:
            return
        over = [
            one | {"ratio": 1.0, "said": f"no longer: {one['said']}"} for key, one in before.items() if key not in here
        ]
        for one in [one for key, one in here.items() if key not in before] + over:
            self.write({"event": "slow", "step": step, **one})
            self.run.console.notice(f"step {step}: {one['said']}")

    def end(self) -> None:
        """The loop is over."""
        self.profiled.end()
