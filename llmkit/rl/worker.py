"""A process that scores samples for one reward, so that what would take all time or memory takes this process alone.

It reads lines of JSON: first the reward with all its settings, then lists of samples; each is answered by a line.
It is given the process that started it, and ends with it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import IO, Any

from llmkit.core.errors import LlmkitError, RecipeError
from llmkit.core.lifeline import bound
from llmkit.rl.checked import Check, Told, Unscored
from llmkit.rl.rewards_node import opened

MEMORY = 2 << 30
"""Bytes, beyond what there is when it begins, for rewards of ours."""


def main(parent: int) -> None:
    """Answers until its input ends."""
    bound(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever started it answers them, and ends it
        signal.signal(number, signal.SIG_IGN)
    asked, told = _channel()
    check = _begun(json.loads(asked.readline()), told)
    if check is not None:
        for line in asked:
            _answer(check, json.loads(line), told)


def _channel() -> tuple[IO[str], IO[str]]:
    """Where it is asked and where it answers: what a reward reads or prints is on neither."""
    asked, told = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return asked, told


def _begun(opening: dict[str, Any], told: IO[str]) -> Check | None:
    """The reward, ready; or none, with what is wrong told."""
    caught = Caught()
    with caught:
        check = opened(opening)
    if caught.error is not None:
        _say(told, _refusal(caught))
        return None
    if check.bounded:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    _say(told, {"ready": True})
    return check


def _refusal(caught: Caught) -> dict[str, Any]:
    if isinstance(caught.error, LlmkitError):
        problem = caught.error.problems[0]
        return {"code": caught.error.code, "error": problem.what, "fix": problem.fix, "key": problem.key}
    return {"code": RecipeError.code, "error": f"it fails as it is read: {caught.why}", "fix": "mend it", "key": "ref"}


def _answer(check: Check, samples: list[Told], told: IO[str]) -> None:
    if check.together:
        caught, made = Caught(), []
        with caught:
            made = check.scores(samples)
        _say(told, caught.told if caught.error is not None else {"scores": made})
        return
    for sample in samples:
        caught, made = Caught(), []
        with caught:
            made = check.scores([sample])
        _say(told, caught.told if caught.error is not None else {"score": made[0]})


class Caught:
    """Whatever is raised inside it: it is told to whoever asked, who decides."""

    error: BaseException | None = None
    place = ""

    def __enter__(self) -> Caught:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.error = error
        while trace is not None:
            self.place, trace = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}", trace.tb_next
        return True

    @property
    def why(self) -> str:
        """In a few words, with the line that it came from."""
        if isinstance(self.error, Unscored):
            return str(self.error)[:300]
        return f"{type(self.error).__name__}: {str(self.error)[:200]} ({self.place})"

    @property
    def told(self) -> dict[str, Any]:
        """As an answer."""
        fix = self.error.fix if isinstance(self.error, Unscored) else "mend the reward"
        return {"fault": self.why, "fix": fix, "certain": isinstance(self.error, Unscored)}


def _say(told: IO[str], what: dict[str, Any]) -> None:
    told.write(json.dumps(what) + "\n")
    told.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
