"""The watch alone: ranks that join, take fake steps and meet a fault; no model."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import torch

from llmkit.core.errors import DataError, PeerError
from llmkit.core.ranks import ranks
from llmkit.core.sliced import Slice
from llmkit.core.stop import Stop
from llmkit.parallel import judge
from llmkit.parallel.alike import marks, odd
from llmkit.parallel.group import agreed, joined
from llmkit.parallel.judge import QUIET, SLACK, Fault, Seen, hung, verdict
from llmkit.parallel.posts import Spoke
from llmkit.parallel.where import states, talks, within
from tests.distributed import ended, launched

BAR = 10.0


class Ring:
    """Ranks that go from phase to phase, with a fault of one of them."""

    def __init__(self, folder):
        self.folder, self.said, self.struck = folder, folder / "said.txt", folder / "struck"

    def strike(self, what):
        self.struck.write_text(str(time.monotonic()))
        what()

    def run(self, world, fault, steps=200, patience=60.0, before=lambda rank: None, facts=lambda rank: {}):
        def work(rank):
            before(rank)
            with ExitStack() as stack:
                stop = stack.enter_context(Stop())
                with stop.at_once("before training"):
                    group = stack.enter_context(joined(ranks(), "cpu", patience, "auto", facts(rank)))
                group.closing(lambda cause: self.close(rank))
                scratch = self.folder / str(rank)
                scratch.mkdir()
                with group.at_work(scratch), stop.at_once("before training"):
                    for step in range(1, steps):
                        for phase in ("data", "forward", "backward", "step"):
                            group.phase(phase, step)
                            fault(rank, phase, step)
                            group.any("")
                        time.sleep(0.01)

        pids = launched(world, work, self.said)
        codes = ended(pids, 250.0)
        since = time.monotonic() - float(self.struck.read_text()) if self.struck.exists() else None
        return codes, since, pids

    def close(self, rank):
        """One of them leaves the status."""
        try:
            (self.folder / "closed").open("x").write(str(rank))
        except FileExistsError:
            return False
        return True

    @property
    def errors(self):
        return [line for line in self.said.read_text().splitlines() if line.startswith("llmkit: error:")]


@pytest.fixture
def ring(tmp_path):
    return Ring(tmp_path)


def at(ring, who, what, phase="forward", step=5):
    """A fault of rank `who`, once."""
    return lambda rank, where, now: (
        ring.strike(what) if (rank, where, now) == (who, phase, step) and not ring.struck.exists() else None
    )


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def test_without_a_fault_all_end_well(ring):
    codes, _, _ = ring.run(3, lambda rank, phase, step: None, steps=10)
    assert codes == [0, 0, 0] and not ring.errors


def test_x1_a_killed_rank_is_named(ring):
    codes, seconds, pids = ring.run(3, at(ring, 1, kill))
    assert codes == [6, -9, 6] and seconds < BAR
    (line,) = ring.errors
    assert line.startswith("llmkit: error: rank 1 (") and f"pid {pids[1]}) died in forward, step 5; fix: run" in line


def test_x5_without_the_main_rank_the_lowest_that_is_left_speaks(ring):
    codes, seconds, _ = ring.run(3, at(ring, 0, kill))
    assert codes == [-9, 6, 6] and seconds < BAR
    (line,) = ring.errors
    assert "rank 0 (" in line and "died in forward, step 5" in line
    assert (ring.folder / "closed").read_text() in "12"


def test_x2_a_stopped_rank_is_named(ring):
    fault = at(ring, 1, lambda: os.kill(os.getpid(), signal.SIGSTOP))

    def waking(rank, phase, step):  # what is stopped cannot end: somebody lets it go on when the others are gone
        if rank == 1 and (phase, step) == ("forward", 5) and not ring.struck.exists():
            pid = os.getpid()
            if os.fork() == 0:
                time.sleep(3 * SLACK)
                os.kill(pid, signal.SIGCONT)
                os._exit(0)
        fault(rank, phase, step)

    codes, _, _ = ring.run(2, waking)
    assert codes == [6, 6]
    (line,) = ring.errors
    assert "rank 1 (" in line and "no sign of life" in line and "in forward, step 5, last seen at " in line


def test_x2_a_rank_that_hangs_is_named_with_its_place_and_all_stacks_are_kept(ring):
    codes, seconds, _ = ring.run(2, at(ring, 1, lambda: time.sleep(100)))
    assert codes == [6, 6] and SLACK < seconds < SLACK + BAR
    (line,) = ring.errors
    assert "rank 1 (" in line and "has not moved" in line and "in forward, step 5, last seen at" in line
    for rank in (0, 1):
        assert "most recent call first" in (ring.folder / str(rank) / "run.log").read_text()


def test_a_fault_of_one_rank_is_that_of_all(ring):
    def fail():
        raise DataError("is no row", fix="mend it", file="rows.jsonl", line=3)

    codes, seconds, _ = ring.run(3, at(ring, 2, fail))
    assert codes == [3, 3, 3] and seconds < BAR
    (line,) = ring.errors
    assert "error: rank 2 (" in line and line.endswith("): rows.jsonl:3: is no row; fix: mend it")


def test_the_main_ranks_own_fault_is_told_by_itself(ring):
    def fail():
        raise DataError("is no row")

    codes, _, _ = ring.run(2, at(ring, 0, fail))
    assert codes == [3, 3] and not ring.errors and "is no row" in ring.said.read_text()


def test_t4_a_signal_to_one_rank_stops_all(ring):
    codes, seconds, _ = ring.run(3, at(ring, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert seconds < BAR and set(codes) <= {0, 75}
    (line,) = ring.errors
    assert "rank 1 (" in line and "stopped by SIGTERM" in line


def test_t4_a_death_outweighs_the_launchers_signal(ring):
    """torchrun ends the others of a rank that died by SIGTERM."""

    def fault(rank, phase, step):
        if (phase, step) == ("forward", 5):
            if rank == 1:
                ring.strike(kill)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)

    codes, seconds, _ = ring.run(2, fault)
    assert codes == [6, -9] and seconds < BAR and "rank 1" in ring.errors[0]


def test_a_watch_that_meets_a_fault_of_its_own_ends_all(ring):
    def before(rank):
        def turn(post, now):
            if rank == 1 and post.where.step > 4 and not ring.struck.exists():
                ring.strike(lambda: 1 / 0)
            return real(post, now)

        real, Spoke.turn = Spoke.turn, turn

    codes, seconds, _ = ring.run(2, lambda *_: None, before=before)
    assert codes == [6, 6] and seconds < BAR
    said = ring.said.read_text()
    assert "the watch has ended; fix: run" in said and "rank 1 (" in said


@pytest.mark.parametrize("missing", [0, 1])
def test_x4_a_rank_that_never_comes(ring, missing):
    codes, _, _ = ring.run(
        2, lambda *_: None, patience=2.0, before=lambda rank: os._exit(7) if rank == missing else None
    )
    assert sorted(codes) == [6, 7]
    said = ring.said.read_text()
    assert "rank 1 of 2 did not come in 2 s" in said if missing else "cannot join the 2 ranks" in said


def test_x7_ranks_that_differ_do_not_begin(ring):
    def facts(rank):
        return {"recipe": {"optim": {"lr": 0.1 * (rank + 1)}}, "code": {"a.py": "1"}}

    codes, _, _ = ring.run(3, lambda *_: None, facts=facts)
    assert codes == [6, 6, 6]
    assert "rank 1 (" in ring.said.read_text() and "has recipe.optim.lr 0.2, and rank 0 (" in ring.said.read_text()


def test_nothing_listens_beyond_the_given_interface(ring):
    def fault(rank, phase, step):
        if rank == 0 and step == 2:
            import psutil

            found = {c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}
            (ring.folder / "listening").write_text(json.dumps(sorted(found)))

    assert ring.run(2, fault, steps=4)[0] == [0, 0]
    assert json.loads((ring.folder / "listening").read_text()) == ["127.0.0.1"]


# the judgement itself, on made-up times


def seen(rank=1, **more):
    one = Seen(rank, f"rank {rank}", "host", 1, 0.0, 0.0, 0.0)
    one.last |= {"phase": "forward", "step": 3, "count": 1, "waiting": False, "stack": ["a.py:1 f"], **more}
    return one


def test_silence_is_long_by_the_median_of_a_step():
    ranks = {0: seen(0), 1: seen()}
    assert verdict(ranks, (), 3 * 2.0 + SLACK, 2.0) is None
    ranks[0].heard = 99.0
    assert "rank 1 has given no sign of life for 12 s in forward, step 3" in verdict(ranks, (), 12.0, 2.0).lines[0]
    assert verdict({1: seen()}, (), QUIET - 1, None) is None and verdict({1: seen()}, (), QUIET + 1, None)


@pytest.mark.parametrize(("found", "near"), [("R", True), ("D", True), ("S", False), ("T", False)])
def test_before_its_first_step_a_rank_of_this_host_that_is_seen_at_work_may_be_silent(found, near, monkeypatch):
    monkeypatch.setattr(judge, "states", lambda pid: {"S", found})
    one = seen()
    one.near = 100.0
    assert (one.silent(QUIET + 1, None) is None) == near
    assert one.silent(101.0, None) and one.silent(QUIET + 1, 1.0)  # not for ever, and not once a step is known
    one.near = 0.0
    assert one.silent(QUIET + 1, None)  # on another host nobody can see it


def test_a_stopped_process_is_told_from_one_that_works():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            assert "R" in states(child.pid)
            child.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            assert states(child.pid) == {"T"}
        finally:
            child.kill()
    assert not states(2**22 + 1)


def test_a_fault_is_held_back_for_a_moment_in_which_a_death_outweighs_a_stop():
    ranks = {0: seen(0), 1: seen(1), 2: seen(2)}
    stop = Fault(1, 75, ("stopped",), 1.0)
    assert verdict(ranks, [stop], 1.1, None) is None
    assert verdict(ranks, [stop], 2.0, None).code == 75
    ranks[2].lost = True
    assert verdict(ranks, [stop], 1.1, None).code == 6
    assert verdict(ranks, [stop, Fault(1, 3, ("no row",), 1.0)], 2.0, None).code == 3


def test_a_long_write_is_no_hang_while_it_gets_on():
    writing, waiting = seen(0, phase="save", alone=True), seen(1, phase="save", waiting=True)

    def judged(now, *ranks):
        for one in ranks:
            one.heard = now
        return hung(dict(enumerate(ranks)), now, 0.1, 100.0)

    assert judged(99.0, writing, waiting) is None
    writing.beat({**writing.last, "cpu": 50.0}, 99.0)
    assert judged(150.0, writing, waiting) is None
    assert "rank 0 has not moved" in judged(200.0, writing, waiting).lines[0]
    assert judged(200.0, writing) is None  # nobody waits


def test_of_ranks_that_all_stand_still_the_one_that_does_not_talk_is_named():
    inside, asleep = seen(0, inside=True), seen(1)
    for one in (inside, asleep):
        one.heard = 9.0
    assert hung({0: inside, 1: asleep}, 9.0, 2.0, 100.0) is None  # three steps and some seconds are not over
    for one in (inside, asleep):
        one.heard = 12.0
    assert "rank 1 has not moved for 12 s" in hung({0: inside, 1: asleep}, 12.0, 2.0, 100.0).lines[0]
    inside.last["inside"] = False
    inside.last["count"] = 9
    assert "rank 1 has not moved for 12 s" in (said := hung({0: inside, 1: asleep}, 12.0, 2.0, 100.0).lines[0])
    assert "nor have the others: rank 0 in forward, step 3" in said
    assert hung({}, 12.0, 2.0, 100.0) is None
    inside.lively = 11.0  # it computes: a step may once be longer
    assert hung({0: inside, 1: asleep}, 12.0, 2.0, 100.0) is None


def test_a_phase_that_was_there_before_may_take_three_times_as_long_and_some_seconds():
    def judged(now, **more):
        evaluating, waiting = seen(0, phase="evaluate", **more), seen(1, phase="evaluate", waiting=True)
        evaluating.heard = waiting.heard = now
        return hung({0: evaluating, 1: waiting}, now, 0.1, 600.0)

    assert judged(500.0) is None and judged(3 * 10.0 + QUIET - 1, usual=10.0) is None
    assert "rank 0 has not moved for 61 s in evaluate" in judged(3 * 10.0 + QUIET + 1, usual=10.0).lines[0]
    reading = seen(phase="evaluate", cpu=1.0)
    reading.beat({**reading.last, "busy": True}, 50.0)  # threads beside the main one, or a disk
    assert reading.lively == 50.0 and reading.changed == 0.0


def test_a_stack_in_a_librarys_talk_is_told_from_one_in_its_work():
    def frame(*files):
        made = None
        for file in reversed(files):
            code = type("Code", (), {"co_filename": file})
            made = type("Frame", (), {"f_code": code, "f_back": made})
        return made

    assert talks(frame("/x/torch/nn/parallel/distributed.py", "/x/torch/nn/modules/module.py", "/y/steps.py"))
    assert talks(frame("/x/torch/utils/_contextlib.py", "/x/torch/distributed/fsdp/a.py", "/y/steps.py"))
    assert talks(frame("/x/deepspeed/comm/torch.py", "/y/steps.py"))
    assert not talks(frame("/x/torch/nn/modules/linear.py", "/y/llama.py", "/x/torch/nn/parallel/distributed.py"))
    assert not talks(frame("/y/steps.py")) and not talks(None)
    assert within(frame("/x/torch/autograd/graph.py")) and not within(frame("/y/my.py", "/x/torch/a.py"))


def test_agreed_names_the_key():
    class Two:
        ranks = ranks({})

        def gather(self, value):
            other = json.loads(json.dumps(value).replace("aaa", "bbb"))
            return [value, other if isinstance(value, list) else "other"]

    with pytest.raises(PeerError, match="has code.fit.py bbb, and"):
        agreed(Two(), {"code": {"fit.py": "aaa"}, "packages": {}})


def test_a_rank_whose_marks_differ_is_told_from_most():
    assert odd([{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 3}]) == ([2], [0, 1], "b")
    assert odd([{"a": 1}, {"b": 2}, {"a": 1}]) is None  # other parts lie elsewhere
    held = {"a": torch.ones(3), "b": Slice(torch.ones(2, dtype=torch.bfloat16), (4,), (2,)), "c": torch.tensor(True)}
    before = marks(held)
    held["a"][1] = torch.nextafter(held["a"][1], torch.tensor(2.0))
    assert {key for key, mark in marks(held).items() if mark != before[key]} == {"a"} and len(before) == 3
