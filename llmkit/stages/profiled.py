"""A trace of the next steps of a run that goes on: `llmkit status RUN --profile N` asks for it by a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llmkit.core.files import ensure, refused, write_json

REQUEST = "profile.request"
FOLDER = "profile"


def ask(folder: Path, steps: int) -> None:
    """Leaves the request in a run's folder."""
    write_json(folder / REQUEST, {"steps": steps})


def asked(folder: Path) -> int:
    """Steps that somebody wants a trace of, or 0; a request is taken once, and one that is broken is none."""
    path = folder / REQUEST
    try:
        steps = json.loads(path.read_text()).get("steps", 0)
    except FileNotFoundError:
        return 0
    except (ValueError, AttributeError):
        steps = 0
    except OSError as cause:
        raise refused(cause, "reading", path) from cause
    path.unlink(missing_ok=True)
    return steps if isinstance(steps, int) and steps > 0 else 0


class Profiled:
    """One rank's trace: of operations on the host, and of kernels on a GPU."""

    def __init__(self, folder: Path, rank: int, device: str, say: Callable[[str], None]) -> None:
        self.folder, self.rank, self.device, self.say = folder / FOLDER, rank, device, say
        self._profile: profile | None = None
        self._left, self._first = 0, 0

    def begin(self, step: int, steps: int) -> None:
        """After `step`: traces the next `steps`; one that is under way is ended."""
        self.end()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])]
        self._profile = profile(activities=kinds)
        self._profile.start()
        self._left, self._first = steps, step + 1

    def stepped(self) -> None:
        """A step is over."""
        self._left -= 1
        if self._profile is not None and self._left <= 0:
            self.end()

    def end(self) -> None:
        """Writes what there is.

        Raises:
            ResourceError: the disk refuses.
        """
        if self._profile is None:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
        made, self._profile = self._profile, None
        made.stop()
        path = self.folder / f"rank{self.rank}-step{self._first}.json.gz"
        try:
            ensure(self.folder)
            made.export_chrome_trace(str(path))
        except OSError as cause:
            raise refused(cause, "writing", path) from cause
        self.say(f"a trace of the steps from {self._first} is in {path}")
