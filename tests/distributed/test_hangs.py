"""Ranks that stand still in a real run: who it is, in which phase and where, in the time that is promised."""

import ctypes
import json
import os
import signal
import time
from statistics import median

import pytest

from llmkit.parallel.judge import QUIET, SLACK
from tests.distributed import ended, equal
from tests.distributed.faults import BAR

pytestmark = pytest.mark.slow


def asleep():
    """Other threads go on: the rank tells that it lives."""
    time.sleep(300)


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def holding():
    """Python's lock is not given back: nothing of the rank's own can tell anything."""
    ctypes.PyDLL(None).sleep(300)


def limit(out):
    """Seconds of three median steps, and some."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return 3 * median(line["seconds"] for line in lines if line["event"] == "train") + SLACK


def stands_still(faults, make, what, phase, rank=1, **more):
    """A rank of two stands still from its third step on; the other's exit status, and seconds until it has ended."""
    pids = faults.launch(2, make, lambda _: faults.at(phase, what, rank, step=3), **more)
    try:
        codes, seconds = faults.codes([pid for number, pid in enumerate(pids) if number != rank], 120)
    finally:
        os.kill(pids[rank], signal.SIGKILL)
    ended(pids[rank : rank + 1])
    return codes, seconds


@pytest.mark.parametrize("what", [asleep, stopped, holding], ids=lambda what: what.__name__)
@pytest.mark.parametrize("phase", ["data", "forward", "backward", "reduce", "step", "evaluate", "save"])
def test_x2_a_rank_that_stands_still_is_named_with_its_phase_and_place(phase, what, faults, make, whole):
    patience = {"parallel": {"patience": 8.0}} if (what, phase) == (asleep, "data") else {}  # rows may take any time
    codes, seconds = stands_still(faults, make, what, phase, **patience)
    in_step = what is not asleep or phase not in ("data", "evaluate", "save")
    assert codes == [6] and seconds < limit(faults.out) + BAR + (0 if in_step else QUIET)
    (line,) = faults.errors
    assert line.startswith("llmkit: error: rank 1 (") and f"in {phase}, step " in line and "last seen at " in line
    assert ("has not moved" if what is asleep else "has given no sign of life") in line
    assert (faults.status["state"], faults.status["exit_code"]) == ("failed", 6)
    assert "most recent call first" in (faults.out / "run.log").read_text()
    stack = (faults.out / "ranks" / "1" / "run.log").read_text()  # by a signal; who is stopped does not hear it
    assert ("most recent call first" in stack and f"in {what.__name__}" in stack) or what is stopped
    assert ended(faults.launch(2, make), 250.0) == [0, 0]
    equal(faults.out, whole, 0.0)


@pytest.mark.parametrize("what", [stopped, holding], ids=lambda what: what.__name__)
def test_x2_a_main_rank_that_stands_still_keeps_its_folder_until_it_is_ended(what, faults, make, whole):
    codes, seconds = stands_still(faults, make, what, "forward", rank=0)
    assert codes == [6] and seconds < limit(faults.out) + BAR
    (line,) = faults.errors
    assert line.startswith("llmkit: error: rank 0 (") and "has given no sign of life" in line
    assert faults.status["state"] == "running"  # it may go on, and is the one that writes
    assert ended(faults.launch(2, make), 250.0) == [0, 0]
    equal(faults.out, whole, 0.0)


@pytest.mark.parametrize("strategy", ["fsdp", {"kind": "zero", "stage": 3}], ids=["fsdp", "zero"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_x2_a_rank_that_hangs_while_the_others_wait_inside_of_a_library(phase, strategy, faults, make):
    parallel = {"strategy": strategy}
    codes, seconds = stands_still(faults, make, asleep, phase, parallel=parallel, adapter={"kind": "none"})
    assert codes == [6] and seconds < limit(faults.out) + BAR
    (line,) = faults.errors
    assert line.startswith("llmkit: error: rank 1 (") and "has not moved for" in line and f"in {phase}, step 3" in line
