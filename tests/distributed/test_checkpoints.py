"""Checkpoints that several ranks wrote: harmed, mixed, of another recipe, on a full disk, in the middle of a pass."""

import json
import os
import shutil
import signal

import pytest

from llmkit.checkpoint import state
from llmkit.core.run import Grants
from tests.disks import kill
from tests.distributed import ended, equal, lines, noted, weights
from tests.distributed.faults import Faults

FOREGROUND = {"checkpoint": {"every": 1, "background": False, "keep": 9}}
PART = "tensors-1-of-2.safetensors"


@pytest.fixture(scope="module")
def left(make, tmp_path_factory):
    """The folder of a run of two ranks that died in step 4, after three checkpoints: do not write into it."""
    faults = Faults(tmp_path_factory.mktemp("left"), lambda *_: None)
    pids = faults.launch(2, make, lambda rank: faults.at("forward", kill, step=4), **FOREGROUND)
    assert faults.codes(pids)[0] == [6, -signal.SIGKILL] and faults.kept == [1, 2, 3]
    return faults.out


@pytest.fixture
def half(left, faults):
    """That folder, to be harmed."""
    shutil.copytree(left, faults.out)
    return faults.out / "checkpoints"


def goes_on(faults, make, codes, **more):
    assert ended(faults.launch(2, make, **(FOREGROUND | more)), 250.0) == codes
    return faults.said.read_text() if faults.said.exists() else ""


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


HARMS = {
    "C5 a bit of a rank's part": lambda last: flip(last / PART),
    "C5 a part that is cut off": lambda last: os.truncate(last / PART, 100),
    "C5 an empty part": lambda last: (last / PART).write_bytes(b""),
    "C5 no part of a rank": lambda last: (last / PART).unlink(),
    "C5 an empty manifest": lambda last: (last / "manifest.json").write_bytes(b""),
    "C10 a part of another step": lambda last: shutil.copy(last.parent / "step-2" / PART, last / PART),
    "C10 a part of another rank": lambda last: shutil.copy(last / PART.replace("1-", "0-"), last / PART),
    "C10 a manifest of another step": lambda last: shutil.copy(
        last.parent / "step-2" / "manifest.json", last / "manifest.json"
    ),
    "C16 a pickle": lambda last: (last / PART).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR."),
}


def test_without_harm_it_goes_on_from_the_last_one(half, faults, make, whole):
    said = json.loads((half / "step-3" / "manifest.json").read_text())
    assert said["world"] == 2 and PART in said["files"]
    goes_on(faults, make, [0, 0])
    equal(faults.out, whole, 0.0)
    assert lines(faults.out) == lines(whole)


@pytest.mark.parametrize(
    "harm", [pytest.param(name, marks=() if "another step" in name else pytest.mark.slow) for name in HARMS]
)
def test_a_harmed_checkpoint_is_named_and_the_one_before_is_used_by_all(harm, half, faults, make, whole):
    HARMS[harm](half / "step-3")
    said = goes_on(faults, make, [4, 4], resume=str(half / "step-3"))
    (line,) = said.splitlines()[:1] or [""]
    assert "step-3" in said and faults.kept == [1, 2, 3] and "Traceback" not in said, said
    if harm == "C10 a part of another step":
        assert "mixes saves: it is rank 1's part of 2 of step 2, and its checkpoint has rank 1's of 2 of step 3" in said
    if harm == "C10 a part of another rank":
        assert "it is rank 0's part of 2 of step 3, and its checkpoint has rank 1's of 2 of step 3" in said
    goes_on(faults, make, [0, 0])  # from step 2
    equal(faults.out, whole, 0.0)
    assert lines(faults.out) == lines(whole)


@pytest.mark.slow
def test_c13_another_recipe_is_refused_by_all_until_its_keys_are_named(half, faults, make, whole):
    more = {"optim": {"kind": "sgd", "lr": 0.4, "momentum": 0.0}}
    before = (faults.out / "metrics.jsonl").read_bytes()
    said = goes_on(faults, make, [2, 2], **more)
    assert "recipe.optim.lr" in said and "was 0.5 when the run began and is 0.4" in said
    assert faults.kept == [1, 2, 3] and (faults.out / "metrics.jsonl").read_bytes() == before
    goes_on(faults, make, [0, 0], grants=Grants(accept=("optim.lr",)), **more)
    assert [line["lr"] for line in lines(faults.out)] == [0.5, 0.5, 0.5, 0.4]


@pytest.mark.slow
def test_c14_a_finished_run_is_left_alone_by_all(whole, faults, make):
    shutil.copytree(whole, faults.out)
    before = {path: path.stat().st_mtime_ns for path in faults.out.rglob("*") if path.is_file()}
    assert ended(faults.launch(2, make), 250.0) == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in faults.out.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("kib", [60, 150])
def test_c2_a_disk_that_fills_up_ends_all_with_5_and_the_run_goes_on_when_there_is_room(kib, disk, faults, make, whole):
    faults.out = disk(kib) / "run"
    said = goes_on(faults, make, [5, 5])
    assert "No space left on device" in said or "a checkpoint needs" in said
    no_room_to_say_so = "status.json failed" in said
    assert no_room_to_say_so or (faults.status["state"], faults.status["exit_code"]) == ("failed", 5)
    for step in faults.kept:
        state.load(faults.out / "checkpoints" / f"step-{step}")
    assert not list(faults.out.glob("checkpoints/.tmp-*"))
    disk(4000)
    goes_on(faults, make, [0, 0])
    equal(faults.out, whole, 0.0)


@pytest.mark.slow
def test_c17_an_out_that_cannot_be_made_is_named_before_the_first_step(faults, make, tmp_path):
    faults.out = tmp_path / ("x" * 300)
    said = goes_on(faults, make, [5, 5])
    assert "failed: File name too long" in said and "Traceback" not in said


@pytest.mark.slow
def test_c11_every_sample_once_a_pass_although_ranks_die_in_the_middle_of_it(faults, make, tmp_path, whole):
    """Each rank writes down what it sees of a step; of a step that was done twice the last time counts."""

    last = {}
    for session, step in enumerate((2, 3, 0)):

        def fault(rank, session=session, step=step):
            noted(tmp_path / f"ids-{session}-{rank}")
            if step:
                faults.at("backward", kill, rank=session % 2, step=step)

        codes = ended(faults.launch(2, make, fault), 250.0)
        assert (-signal.SIGKILL in codes) == bool(step)
        seen = {}
        for rank in range(2):
            for number, ids in map(json.loads, (tmp_path / f"ids-{session}-{rank}").read_text().splitlines()):
                seen.setdefault(number, []).extend(ids)
        last |= seen
    assert sorted(last) == [1, 2, 3, 4]
    for first in (1, 3):  # two steps of 12 are a pass of 24
        assert sorted(last[first] + last[first + 1]) == list(range(24))
    equal(faults.out, whole, 0.0)
    assert weights(faults.out)
