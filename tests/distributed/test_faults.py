"""Ranks that die, hang, are stopped or disagree: who is left ends soon and says who it was, and the run can go on."""

import json
import os
import signal
import time

import pytest

from llmkit import run
from llmkit.parallel.group import Group
from tests.distributed import QUIET, ended, equal, launched, lines, sft, trained

PHASES = ["start", "data", "forward", "backward", "reduce", "step", "evaluate", "save", "exit"]
FAST = ["forward", "reduce", "save"]
BAR = 10.0
"""Seconds that who is left may take to end."""


def slow(values, fast):
    return [pytest.param(value, marks=() if value in fast else pytest.mark.slow) for value in values]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Faults:
    """Ranks with a fault put in: where Group.phase is told a phase and a step, a rank does something."""

    def __init__(self, folder):
        self.said, self.struck, self.out = folder / "said.txt", folder / "struck", folder / "run"

    def at(self, phase, what, rank=1, step=2):
        """Makes the fault, in a child."""

        def told(group, name, at=0):
            real(group, name, at)
            at = group.watch.where.step
            if (name, group.ranks.rank) == (phase, rank) and at >= step * (phase not in ("start", "data0")):
                self.strike(what)

        real = Group.phase
        Group.phase = told

    def strike(self, what):
        if not self.struck.exists():
            self.struck.write_text(str(time.monotonic()))
            what()

    def launch(self, world, make, fault=lambda rank: None):
        def work(rank):
            fault(rank)
            run(make(self.out), console=QUIET)

        return launched(world, work, self.said)

    def codes(self, pids, seconds=60.0):
        """Exit codes; that the fault took effect, and how long the others took to end."""
        codes = ended(pids, seconds)
        assert self.struck.exists(), "the fault never came"
        return codes, time.monotonic() - float(self.struck.read_text())

    @property
    def errors(self):
        return [line for line in self.said.read_text().splitlines() if line.startswith("llmkit: error:")]

    @property
    def status(self):
        return json.loads((self.out / "status.json").read_text())


@pytest.fixture
def faults(tmp_path):
    return Faults(tmp_path)


@pytest.fixture
def make(tiny, rows):
    source = [{"kind": "jsonl", "path": str(rows)}]

    def make(out, **more):
        data = {"train": source, "valid": source, "max_length": 64}
        often = {"evaluate": {"every": 2, "samples": 0, "rows": 4}, "checkpoint": {"every": 1}, "steps": 4}
        return sft(tiny, rows, out, data=data, **(often | more))

    return make


@pytest.fixture
def whole(make, tmp_path):
    """The control: the same run without a fault."""
    return trained(2, make, tmp_path, "whole")


@pytest.mark.parametrize("phase", slow(PHASES, FAST))
def test_x1_a_rank_that_is_killed_is_named_and_the_run_goes_on(phase, faults, make, whole, tmp_path):
    codes, seconds = faults.codes(faults.launch(2, make, lambda rank: faults.at(phase, kill)))
    assert codes == [6, -signal.SIGKILL] and seconds < BAR
    (line,) = faults.errors
    assert "rank 1 (" in line and f" died in {phase}" in line and "run the same command again" in line
    assert phase in ("start", "exit") or "step 2" in line
    if phase != "start":
        said = faults.status
        assert (said["state"], said["exit_code"]) == ("failed", 6) and f"died in {phase}" in said["why"]
    assert ended(faults.launch(2, make)) == [0, 0]
    equal(faults.out, whole, 0.0)
    assert lines(faults.out) == lines(whole)
