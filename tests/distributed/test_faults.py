"""Ranks that die, hang, are stopped or disagree: who is left ends soon, says who it was, and the run goes on from there."""

import json
import os
import signal
import time

import pytest

from llmkit import run
from llmkit.core.errors import DataError
from llmkit.parallel.group import Group
from llmkit.stages import build_training
from tests.distributed import QUIET, ended, equal, launched, lines, sft, trained

PHASES = ["start", "data", "forward", "backward", "reduce", "step", "evaluate", "save", "exit"]
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
            if (
                (name, group.ranks.rank) == (phase, rank)
                and group.watch.where.step >= step
                and not self.struck.exists()
            ):
                self.struck.write_text(str(time.monotonic()))
                what()

        real, Group.phase = Group.phase, lambda *given: told(*given)

    def launch(self, world, make, fault=lambda rank: None, **more):
        def work(rank):
            fault(rank)
            run(make(self.out, **more), console=QUIET)

        return launched(world, work, self.said)

    def codes(self, pids, seconds=250.0):
        """Exit codes, after proof that the fault took effect; and how long the others took to end."""
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


@pytest.fixture(scope="module")
def make(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    said = [("hello world " * (1 + i % 5) + str(i), "the lazy dog " * (1 + i % 3)) for i in range(24)]
    path.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in said))
    source = [{"kind": "jsonl", "path": str(path)}]

    def make(out, **more):
        data = {"train": source, "valid": source, "max_length": 64}
        often = {"evaluate": {"every": 2, "samples": 0, "rows": 4}, "checkpoint": {"every": 1}, "steps": 4}
        return sft(tiny, path, out, **({"data": data} | often | more))

    return make


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """The control: the same run without a fault."""
    return trained(2, make, tmp_path_factory.mktemp("whole"), "whole")


@pytest.mark.parametrize("phase", slow(PHASES, ["reduce", "save"]))
def test_x1_a_rank_that_is_killed_is_named_and_the_run_goes_on(phase, faults, make, whole):
    early = phase == "start"
    codes, seconds = faults.codes(faults.launch(2, make, lambda rank: faults.at(phase, kill, step=0 if early else 2)))
    assert codes == [6, -signal.SIGKILL] and seconds < BAR
    (line,) = faults.errors
    assert "rank 1 (" in line and f" died in {phase}" in line and "run the same command again" in line
    assert early or "step 4" in line or "step 2" in line
    if not early:
        said = faults.status
        assert (said["state"], said["exit_code"]) == ("failed", 6) and f"died in {phase}" in said["why"]
    assert ended(faults.launch(2, make), 250.0) == [0, 0]
    equal(faults.out, whole, 0.0)
    assert lines(faults.out) == lines(whole)
