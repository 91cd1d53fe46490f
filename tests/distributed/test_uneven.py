"""Ranks whose shares, memory and clocks differ: nobody is left waiting, and the run is the run that it was."""

import json
import os
import resource
import signal
import time

import psutil
import pytest
import torch

from llmkit import run
from llmkit.checkpoint import state
from tests.distributed import QUIET, ended, equal, launched, lines, noted, trained
from tests.distributed.faults import BAR


def seen(world, node, folder):
    """{step: the ids that each rank saw} of a run."""

    def work(rank):
        noted(folder / f"ids-{rank}")
        run(node, console=QUIET)

    assert ended(launched(world, work, folder / "said"), 200) == [0] * world, (folder / "said").read_text()[-2000:]
    found = {}
    for rank in range(world):
        for step, ids in map(json.loads, (folder / f"ids-{rank}").read_text().splitlines()):
            found.setdefault(step, []).append(ids)
    return found


@pytest.mark.parametrize("rows", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_x8_rows_that_do_not_go_into_ranks_are_each_seen_once(rows, make, tmp_path):
    """24 rows of many lengths on 3 ranks: the last of the steps of 7 is short, and of 1 row two ranks have nothing."""

    def node(out):
        return make(out, batch={"rows": rows}, epochs=1, steps=None, evaluate={}, checkpoint={"every": 100})

    found = seen(3, node(tmp_path / "run"), tmp_path)
    shares = [len(ids) for step in found.values() for ids in step]
    assert len(found) == -(-24 // rows) and 0 in shares and max(shares) > 0  # the control: some have nothing
    assert sorted(i for step in found.values() for ids in step for i in ids) == list(range(24))
    equal(tmp_path / "run", trained(1, node, tmp_path, "alone"))


@pytest.mark.slow
def test_t2_memory_that_gives_out_on_one_rank_ends_all_with_5(faults, make, whole):
    def greedy():
        room = psutil.Process().memory_info().vms + (64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.getrlimit(resource.RLIMIT_AS)[1]))
        torch.empty(1 << 28)

    codes, seconds = faults.codes(faults.launch(2, make, lambda rank: faults.at("forward", greedy, step=3)))
    assert codes == [5, 5] and seconds < BAR
    (line,) = faults.errors
    assert "error: rank 1 (" in line and "memory gave out" in line and "lower micro_batch" in line
    assert (faults.status["state"], faults.status["exit_code"]) == ("failed", 5)
    state.load(faults.out / "checkpoints" / f"step-{faults.kept[-1]}")
    assert ended(faults.launch(2, make), 250.0) == [0, 0]
    equal(faults.out, whole, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_t4_any_signal_that_asks_to_stop_stops_all(number, faults, make, whole):
    def twice():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    codes, seconds = faults.codes(faults.launch(2, make, lambda rank: faults.at("backward", twice)))
    assert codes == [75, 75] and seconds < BAR
    assert faults.status["state"] == "stopped" and number.name in faults.status["why"]
    assert ended(faults.launch(2, make), 250.0) == [0, 0]
    equal(faults.out, whole, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("days", [-1, 1])
def test_t5_a_wall_clock_that_leaps_on_one_rank_changes_nothing(days, faults, make, whole):
    def leap():
        real = time.time
        time.time = lambda: real() + days * 86400
        assert abs(time.time() - real()) > 80000  # it took effect

    codes, _ = faults.codes(faults.launch(2, make, lambda rank: faults.at("forward", leap)))
    assert codes == [0, 0]
    equal(faults.out, whole, 0.0)
    assert lines(faults.out) == lines(whole)
    saw = [json.loads(line) for line in (faults.out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_second"] > 0 for line in saw if line["event"] == "train")
