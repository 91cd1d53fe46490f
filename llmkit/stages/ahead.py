"""Rollouts that are drawn while steps learn from the one before: by a thread, from a copy of the weights as they were
when those steps began. What is drawn is in a file before a checkpoint is that goes on behind it, since those weights
are gone then; what no checkpoint goes on from is in none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmkit.core.errors import DataError
from llmkit.core.files import as_json, write_atomic
from llmkit.core.folder import steps
from llmkit.core.metrics import Lines
from llmkit.data.asked import Asked
from llmkit.data.rolled import Rolled
from llmkit.stages.answering import Answering
from llmkit.stages.likelihoods import Likelihoods
from llmkit.stages.worth import Worth, bare, read, told

NONE = -1
"""The number of no rollout."""
BEHAVIOUR = "behaviour"
"""The log-probabilities by the weights that drew, by the forward of training over the engine's copy."""


class Flight(NamedTuple):
    """A rollout that is being drawn."""

    number: int
    version: int
    lines: Future[list[dict[str, Any]]]


class Early(NamedTuple):
    """A rollout that was drawn before."""

    held: list[Worth]
    version: int
    behaviour: list[list[float]]


class Ahead:
    """Draws the next rollout; one at a time."""

    def __init__(self, answering: Answering, asked: Asked, likelihoods: Likelihoods, path: Path, last: int) -> None:
        """`likelihoods`: by the engine's copy; `last`: the number of the run's last rollout."""
        self.answering, self.asked, self.likelihoods, self.last = answering, asked, likelihoods, last
        self.steps = answering.node.rollout.steps
        self.lines, self.checkpoints = Lines(path), path.parent / "checkpoints"
        self.pool, self.threads = ThreadPoolExecutor(1), torch.get_num_threads()
        self.flying: Flight | None = None
        self.kept: list[dict[str, Any]] = []
        """The lines of the rollout that came last."""
        self.marked = NONE
        """The rollout that the last checkpoint goes on from: it may be on its way to the disk still."""
        self.lost = NONE
        """The rollout that failed before a checkpoint was made."""

    def begin(self, state: Mapping[str, Any]) -> None:
        """Goes to where a checkpoint was: of what was drawn behind it nothing is left."""
        if self.flying is not None:
            self.flying.lines.exception()
        self.marked, self.lost = int(state.get("ahead", NONE)), int(state.get("ahead_lost", NONE))
        self.flying, self.kept = None, []
        self._write([line for line in self.lines.read() if line["rollout"] <= self.marked])

    def start(self, number: int, version: int, prompts: Sequence[int]) -> None:
        """Begins to draw rollout `number` from the weights of now, which are of this version."""
        if number > self.last:
            return
        self.answering.drawing.writer.renew(version)
        self.flying = Flight(number, version, self.pool.submit(self._told, number, version, list(prompts)))

    def take(self, number: int) -> Early | None:
        """What was drawn, waited for; None of the rollout that failed before the checkpoint that this run began from.

        Raises:
            DataError: the file does not hold it.
        """
        if self.flying is None and number == self.lost:
            return None
        self._settle()
        lines = [line for line in self.kept or self.lines.read() if line["rollout"] == number]
        if not lines:
            what = f"holds nothing of rollout {number}, which was drawn before the checkpoint was made"
            raise DataError(what, fix="go on from an earlier checkpoint", file=str(self.lines.path))
        held, known = read(lines, [BEHAVIOUR])
        return Early(held, lines[0]["version"], known[BEHAVIOUR] or [])

    def state(self, number: int) -> dict[str, int]:
        """Rollout `number`, which is waited for and is in the file then, with those of the checkpoints that are there.
        One that failed is named, so that a run that goes on draws it anew: the steps that are done are kept, and who
        takes it meets the fault."""
        if self.flying is not None and self.flying.number == number:
            if self.flying.lines.exception() is None:
                self._settle()
            else:
                self.lost = number
        mine = [line for line in self.kept if line["rollout"] == number]
        held = {self.marked, number, *(-(-step // self.steps) for step in steps(self.checkpoints))}
        held -= {number} if mine else set()
        self._write([line for line in self.lines.read() if line["rollout"] in held] + mine)
        self.marked = number
        return {"ahead": number, "ahead_lost": self.lost}

    def likely(self, held: Sequence[Worth]) -> list[list[float]]:
        """How likely the engine's copy finds the tokens of these answers."""
        return self.likelihoods.policy(self._bare(held))

    def close(self) -> None:
        """Waits for what is being drawn."""
        self.pool.shutdown()

    def _settle(self) -> None:
        if self.flying is None:
            return
        flight, self.flying = self.flying, None
        self.kept = flight.lines.result()

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """The file anew, whole or not at all: how long it is follows from the checkpoints, and not from the run."""
        if lines or self.lines.path.exists():
            write_atomic(self.lines.path, "".join(as_json(line) + "\n" for line in lines).encode())

    def _bare(self, held: Sequence[Worth]) -> Rolled:
        return bare(self.asked, held, False, lambda completions, _: float(completions))

    def _told(self, number: int, version: int, prompts: list[int]) -> list[dict[str, Any]]:
        """In the thread: the lines, as they would be read."""
        torch.set_num_threads(self.threads)  # which each thread has of its own
        held = self.answering.drawing.over(lambda: self.answering.drawn(number, prompts))
        plain = self._bare(held)
        known = {BEHAVIOUR: self.likelihoods.policy(plain)}
        lines = told(number, version, self.asked, held, plain, known, self.answering.words)
        return [json.loads(as_json(line)) for line in lines]
