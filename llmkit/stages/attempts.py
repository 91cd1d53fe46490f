"""A run that one step ends again and again is not begun anew: a launcher would restart it for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmkit.core.errors import PeerError
from llmkit.train.fit import StepData
from llmkit.train.guard import named

MOST = 3
"""Sessions that one step may end."""


class Attempts:
    """Which step the run is in, in a file that stays where a session does not come to an end."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".attempts.json"
        self.before: tuple[int, int] = (0, 0)
        """The step that ended the session before, and how many sessions in a row it did."""

    def begin(self) -> None:
        """Reads what the session before left.

        Raises:
            PeerError: the last `MOST` sessions were ended by one step.
        """
        if (said := self._read()) is None:
            return
        step, (last, times) = said["step"], said["before"]
        self.before = (step, times + 1 if step == last else 1)
        if self.before[1] >= MOST:
            what = f"step {step} has ended the run {self.before[1]} times; {said['saw']}"
            raise PeerError(what, fix=f"take these samples out, or remove {self.path} to try again")

    def _read(self) -> dict[str, Any] | None:
        try:
            said = json.loads(self.path.read_text("utf-8"))
            (last, times), step, saw = said["before"], said["step"], said["saw"]
        except (OSError, ValueError, LookupError, TypeError):
            return None  # none was left, or it was being written when the session ended
        return {"step": step, "before": (last, times), "saw": saw}

    def enter(self, step: int, data: StepData) -> None:
        """A step begins: who dies in it is known to have."""
        saw = named(data.ids, data.places)
        self.path.write_text(json.dumps({"step": step, "saw": saw, "before": self.before}), "utf-8")

    def end(self) -> None:
        """The session came to an end."""
        self.path.unlink(missing_ok=True)
