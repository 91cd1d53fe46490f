"""Ranks that die, hang, are stopped or disagree: who is left ends soon and says who it was; the run goes on then."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llmkit import run
from llmkit.core.errors import DataError
from llmkit.core.scalars import Origin
from llmkit.parallel.steps import Steps
from llmkit.recipe.load import Recipe
from llmkit.recipe.show import resolved
from llmkit.stages import build_training
from tests.disks import kill
from tests.distributed import QUIET, ended, equal, free_port, launched, lines
from tests.distributed.faults import BAR, stopping

PHASES = ["start", "data", "forward", "backward", "reduce", "step", "evaluate", "save", "exit"]


def slow(values, fast):
    return [pytest.param(value, marks=() if value in fast else pytest.mark.slow) for value in values]


@pytest.mark.parametrize("phase", slow(PHASES, ["reduce"]))
def test_x1_a_rank_that_is_killed_is_named_and_the_run_goes_on(phase, faults, make, whole):
    early = phase == "start"
    codes, seconds = faults.codes(faults.launch(2, make, lambda rank: faults.at(phase, kill, step=0 if early else 2)))
    assert codes == [6, -signal.SIGKILL] and seconds < BAR
    (line,) = faults.errors
    assert "rank 1 (" in line and f" died in {phase}" in line and "run the same command again" in line
    assert early or "step 4" in line or "step 2" in line
    if not early:
        said = faults.status
        done = phase == "exit" and said["state"] == "done"  # the result was whole before anybody heard of the death
        assert done or ((said["state"], said["exit_code"]) == ("failed", 6) and f"died in {phase}" in said["why"])
    assert ended(faults.launch(2, make), 250.0) == [0, 0]
    equal(faults.out, whole, 0.0)
    assert lines(faults.out) == lines(whole)


SHARED = {
    "fsdp": {"strategy": "fsdp"},
    "zero": {"strategy": "zero"},
    "tensor": {"tensor": 2},
    "context": {"context": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SHARED)[:3])
def test_x1_every_strategy_says_when_it_sums_gradients(kind, faults, make, whole):
    more = {"parallel": SHARED[kind]}
    codes, seconds = faults.codes(faults.launch(2, make, lambda rank: faults.at("reduce", kill), **more))
    assert codes == [6, -signal.SIGKILL] and seconds < BAR
    assert "rank 1 (" in faults.errors[0] and " died in reduce, step " in faults.errors[0]
    assert ended(faults.launch(2, make, **more), 250.0) == [0, 0]
    equal(faults.out, whole, 1e-4)  # LoRA from its zero start, at a steep rate


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("kind", SHARED)
def test_x2_a_rank_that_hangs_where_ranks_need_each_other_in_every_layer(kind, phase, faults, make):
    def fault(rank):
        faults.at(phase, lambda: time.sleep(300), step=3)

    codes, seconds = faults.codes(faults.launch(2, make, fault, parallel=SHARED[kind]))
    assert codes == [6, 6] and seconds < 3 * BAR
    (line,) = faults.errors
    assert "rank 1 (" in line and f" in {phase}, step 3, last seen at distributed/test_faults.py:" in line


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["forward", "reduce", "save", "exit"])
def test_x5_without_the_main_rank_the_others_end_and_leave_its_status(phase, faults, make, whole):
    codes, seconds = faults.codes(faults.launch(3, make, lambda rank: faults.at(phase, kill, rank=0)))
    assert codes == [-signal.SIGKILL, 6, 6] and seconds < BAR
    (line,) = faults.errors
    assert "rank 0 (" in line and f"died in {phase}" in line
    said, kept = faults.status, faults.kept
    assert (said["state"], said["exit_code"], said["step"]) == ("failed", 6, kept[-1] if kept else 0)
    assert ended(faults.launch(2, make), 250.0) == [0, 0]
    equal(faults.out, whole, 1e-4)  # steps of three ranks were summed in another order


@pytest.mark.parametrize("who", slow(["one", "all"], ["one"]))
@pytest.mark.parametrize("phase", slow(PHASES[:-1], ["forward"]))
def test_t4_a_signal_stops_all_ranks_at_one_place(phase, who, faults, make, whole):
    early = phase == "start"

    def fault(rank):
        faults.at(phase, stopping(signal.SIGTERM, 2), rank=1 if who == "one" else rank, step=0 if early else 2)

    codes, seconds = faults.codes(faults.launch(2, make, fault))
    assert set(codes) <= {0, 75} and seconds < BAR  # 0 by the watch, which knows that a launcher takes 75 for a failure
    if not early:
        said = faults.status
        assert (said["state"], said["exit_code"]) == ("stopped", 75) and "SIGTERM" in said["why"]
        assert faults.kept[-1:] == [said["step"]]
    assert ended(faults.launch(2, make), 250.0) == [0, 0]
    equal(faults.out, whole, 0.0)


@pytest.mark.slow
def test_a_fault_of_one_ranks_data_ends_all(faults, make):
    def fault(rank):
        def read(node, run):
            if rank == 1:
                faults.struck.write_text(str(time.monotonic()))
                raise DataError("is no row", fix="mend it", file="rows.jsonl", line=3)
            return real(node, run)

        real, build_training.read = build_training.read, read

    codes, seconds = faults.codes(faults.launch(2, make, fault))
    assert codes == [3, 3] and seconds < BAR
    (line,) = faults.errors
    assert "error: rank 1 (" in line and "rows.jsonl:3: is no row; fix: mend it" in line
    assert not faults.out.exists()  # nothing was done, and nothing is left


@pytest.mark.slow
def test_t7_an_evaluation_that_fails_on_one_rank_is_named(faults, make, whole):
    def fault(rank):
        def measured(job, built, steps, step):
            if rank == 1 and step == 2:
                faults.struck.write_text(str(time.monotonic()))
                raise ValueError("no tokens")
            return real(job, built, steps, step)

        real, build_training.measured = build_training.measured, measured

    codes, seconds = faults.codes(faults.launch(2, make, fault))
    assert codes == [3, 3] and seconds < BAR
    (line,) = faults.errors
    assert "error: rank 1 (" in line and "the evaluation after step 2 failed: no tokens" in line
    assert ended(faults.launch(2, make), 250.0) == [0, 0]
    equal(faults.out, whole, 0.0)


@pytest.mark.slow
def test_x7_another_recipe_on_one_rank(faults, make):
    def work(rank):
        run(make(faults.out, seed=rank), console=QUIET)

    assert ended(launched(2, work, faults.said), 250.0) == [6, 6]
    assert "has recipe.seed 1, and rank 0 (" in faults.said.read_text() and not faults.out.exists()


@pytest.mark.slow
def test_x10_a_step_that_ends_the_run_three_times_is_named(faults, make):
    for _ in range(3):
        faults.struck.unlink(missing_ok=True)
        codes, _ = faults.codes(faults.launch(2, make, lambda rank: faults.at("backward", kill)))
        assert codes == [6, -signal.SIGKILL]
    assert ended(faults.launch(2, make), 250.0) == [6, 6]
    said = faults.status
    assert said["state"] == "failed" and "step 2 has ended the run 3 times; sample ids " in said["why"]
    (faults.out / ".attempts.json").unlink()
    assert ended(faults.launch(2, make), 250.0) == [0, 0]
    assert not (faults.out / ".attempts.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_x13_a_corrupted_replica_is_named_and_not_saved(world, faults, make, whole):
    def fault(rank):
        def step(self, *given):
            real(self, *given)
            if rank == 1 and len(done) == 1:
                faults.struck.write_text(str(time.monotonic()))
                next(iter(self.params.values())).data.view(-1)[0] += 1e-3
            done.append(1)

        done, real = [], Steps.step
        Steps.step = step

    codes, _ = faults.codes(faults.launch(world, make, fault, guard={"checksum": 1}))
    assert codes == [6] * world
    assert "after step 2 rank " in (why := faults.status["why"]) and "holds other values than" in why
    assert ("rank 1 (" in why.partition("holds")[0]) or world == 2
    assert faults.status["step"] == 1
    assert ended(faults.launch(2, make, guard={"checksum": 1}), 250.0) == [0, 0]  # the control
    equal(faults.out, whole, 1e-5 if world == 2 else 1e-4)  # the first step was summed in another order


def command(driver, out, folder, make, **more):
    """The command line that runs a recipe on two ranks under torchrun."""
    text = resolved(Recipe((("", make(out, **more)),), {"": Origin()}))
    (folder / "recipe.yaml").write_text(text)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    return [*run, "--master-port", str(free_port()), str(driver), "run", str(folder / "recipe.yaml")]


KILLER = """
import os, signal
from llmkit.parallel.group import Group
real = Group.phase
def phase(self, name, step=0):
    real(self, name, step)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and (name, step) == ("backward", 3):
        open({mark!r}, "w").close()
        os.kill(os.getpid(), signal.{number})
Group.phase = phase
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_torchrun_restarts_a_run_that_died_and_no_run_that_was_stopped(number, faults, make, whole, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        KILLER.format(mark=str(faults.struck), number=number) + "from llmkit.cli.main import main\nmain()\n"
    )
    words = command(driver, faults.out, tmp_path, make)
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=800, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0 and faults.struck.exists(), done.stderr[-3000:]
    if number == "SIGTERM":
        assert faults.status["state"] == "stopped" and faults.status["exit_code"] == 75
        return
    assert "rank 1 (" in done.stderr and "died in backward, step 3" in done.stderr and faults.status["state"] == "done"
    equal(faults.out, whole, 0.0)
    assert lines(faults.out) == lines(whole)


CRASHER = """
import os, signal
from llmkit.parallel.group import Group
real = Group.phase
def phase(self, name, step=0):
    real(self, name, step)
    if os.environ["RANK"] == "1" and (name, step) == ("backward", 3):
        with open({mark!r}, "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
Group.phase = phase
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_x10_restarts_end_at_a_step_that_ends_every_session(faults, make, tmp_path):
    (tmp_path / "driver.py").write_text(
        CRASHER.format(mark=str(faults.struck)) + "from llmkit.cli.main import main\nmain()\n"
    )
    words = command(tmp_path / "driver.py", faults.out, tmp_path, make)
    words[words.index("--max-restarts") + 1] = "4"
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=800, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode != 0 and faults.struck.read_text() == "xxx", done.stderr[-3000:]  # and not five times
    assert "step 3 has ended the run 3 times; sample ids " in faults.status["why"] and faults.kept[-1] < 3
