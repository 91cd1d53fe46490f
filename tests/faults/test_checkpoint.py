"""Checkpoints of whole runs: full disks, kills while old ones go, hostile facts, folders that refuse."""

import errno
import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from llmkit.checkpoint import state
from llmkit.checkpoint.manifest import seal
from llmkit.core.console import Console
from llmkit.core.errors import ModelError, RecipeError, ResourceError
from llmkit.core.files import Disk
from llmkit.core.folder import claim
from llmkit.core.run import Grants
from llmkit.stages import build_training
from tests.disks import Scripted
from tests.faults import go, in_child, killed_after, outcome, sft, status


def tensors(step):
    return {"a": torch.full((8,), float(step))}


def save(folder, step, disk=None):
    return state.save(folder, step, tensors(step), {"step": step}, *([disk] if disk else []))


class Crash(Scripted):
    """The process dies at a write-class call; files are written whole, and folders go file by file, each of them a
    call."""

    def write(self, path, parts):
        self.now()
        Disk.write(self, path, parts)
        self.now()

    def remove(self, path):
        for inner in sorted(path.iterdir()):
            self.now()
            inner.unlink()
        self.now()
        path.rmdir()


def test_c8_a_kill_at_every_call_of_a_rotation_leaves_a_whole_one_and_the_best(tmp_path):
    ends, at = Counter(), 0
    while not ends[0]:
        at += 1
        folder = tmp_path / str(at)
        for step in (1, 2):
            save(folder, step)

        def rotate(folder=folder, disk=Crash(at)):  # keep=1, and the best is the oldest
            save(folder, 3, disk)
            state.prune(folder, 1, 1, disk)

        ends[in_child(rotate)] += 1
        found = state.newest(folder, lambda text: None)
        assert found[0].name in ("step-2", "step-3") and torch.equal(
            found[1]["a"], tensors(int(found[0].name[5:]))["a"]
        )
        assert torch.equal(state.load(folder / "step-1")[0]["a"], tensors(1)["a"])
        save(folder, 3)
        state.prune(folder, 1, 1)
        assert state.steps(folder) == [3, 1]
    assert set(ends) == {-signal.SIGKILL, 0} and ends[-signal.SIGKILL] >= 12


def test_c2_the_bytes_needed_are_said_before_one_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    usage = shutil.disk_usage(tmp_path)
    big = {"a": torch.zeros(3 << 20)}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 << 20))
    with pytest.raises(ResourceError, match=r"out: a checkpoint needs 12 MiB and .* has 5 MiB; fix: free some space"):
        state.save(tmp_path, 2, big, {"step": 2})
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    assert state.save(tmp_path, 2, big, {"step": 2}).name == "step-2"  # the control


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "run.log"])
def test_c2_a_full_disk_under_a_log_is_one_line_and_not_a_fault_of_ours(name, tiny, world, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "status.json").write_text("{}")
    (out / name).symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=rf"writing .*{name} failed: No space left on device; fix: free some"):
        go(sft(tiny, world[0], out))
    assert status(out)[:2] == ("failed", 5)


@pytest.mark.parametrize("kib", [8, 36, 60, 120, 180, 216, 224])
def test_c2_a_run_whose_disk_fills_up_ends_with_5_and_goes_on_exactly_when_there_is_room(kib, tiny, world, disk):
    out = disk(kib) / "run"
    with pytest.raises(ResourceError, match="No space left on device|a checkpoint needs"):
        go(sft(tiny, world[0], out))
    kept = state.steps(out / "checkpoints") if (out / "checkpoints").is_dir() else []
    for step in kept:
        state.load(out / "checkpoints" / f"step-{step}")
    assert not list(out.glob("checkpoints/.tmp-*"))
    disk(4000)
    go(sft(tiny, world[0], out))
    assert outcome(out) == outcome(world[1])


def sealed(path, facts=None, header=None):
    """Changes what a checkpoint says, and its manifest with it: sound digests over hostile contents."""
    if facts is not None:
        raw = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
        (path / "state.json").write_bytes(raw)
    if header is not None:
        raw = json.dumps(header).encode()
        (path / "tensors-0-of-1.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(64))
    said = json.loads((path / "manifest.json").read_text())
    for name in said["files"]:
        said["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "manifest.json").write_bytes(seal(said))


HEADERS = {
    "dtype": {"a": {"dtype": "OBJ", "shape": [8], "data_offsets": [0, 32]}},
    "shape": {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 32]}},
    "offsets": {"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 1 << 60]}},
    "no item": {"a": None},
    "no offsets": {"a": {"dtype": "F32", "shape": [8]}},
    "code": {"a": {"dtype": "__reduce__", "shape": "os.system", "data_offsets": ["id", "id"]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_c16_a_hostile_header_under_a_sound_digest_is_a_damaged_file(name, tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    sealed(path, {"step": 2})
    assert state.load(path)  # the control: the seal is sound
    sealed(path, header=HEADERS[name])
    with pytest.raises(ModelError, match="step-2: says what no save of ours says"):
        state.load(path)
    said = []
    assert state.newest(tmp_path, said.append)[0].name == "step-1" and len(said) == 1 and "\n" not in said[0]


@pytest.mark.parametrize(
    ("name", "raw"),
    [(name, raw) for name in ("manifest.json", "state.json") for raw in (b"[" * 100_000, b"null", b"[]", b"7")]
    + [("manifest.json", b'{"format": %d, "files": %s}' % (n, f)) for n in (1, 2) for f in (b"7", b'["a"]')],
    ids=lambda value: str(value)[:40],
)
def test_c16_hostile_json_is_a_damaged_file(name, raw, tmp_path):
    path = save(tmp_path, 2)
    (path / name).write_bytes(raw)
    if name == "state.json":
        sealed(path)
    with pytest.raises(ModelError, match="step-2"):
        state.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: {"step": 4},
        lambda facts: facts | {"progress": None},
        lambda facts: facts | {"progress": {"step": 4, "__class__": "os.system"}},
        lambda facts: facts | {"progress": facts["progress"] | {"watch": {"losses": 3}}},
        lambda facts: facts | {"identity": [1]},
        lambda facts: facts | {"metrics_bytes": "all"},
    ],
    ids=["no facts", "no progress", "class", "watch", "identity", "bytes"],
)
def test_c16_hostile_facts_are_named_and_nothing_is_trained(change, tiny, world, half):
    path = half / "checkpoints" / "step-4"
    sealed(path, change(json.loads((path / "state.json").read_text())))
    lines = (half / "metrics.jsonl").read_bytes()
    with pytest.raises(ModelError, match=r"step-4/state\.json: says what no save of ours says"):
        go(sft(tiny, world[0], half))
    assert (half / "metrics.jsonl").read_bytes() == lines and status(half) == ("failed", 4, 4)


def test_c5_a_named_checkpoint_that_is_damaged_is_refused_and_not_replaced(tiny, world, half):
    path = half / "checkpoints" / "step-4" / "tensors-0-of-1.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ModelError, match=r"step-4/tensors-0-of-1\.safetensors: is damaged"):
        go(sft(tiny, world[0], half), resume=str(path.parent))
    go(sft(tiny, world[0], half), resume=str(half / "checkpoints" / "step-2"))  # the control
    assert outcome(half) == outcome(world[1])


def test_a_run_that_goes_on_from_an_older_step_leaves_the_later_ones_behind(tiny, world, half):
    folder, older = half / "checkpoints", str(half / "checkpoints" / "step-2")
    node = sft(tiny, world[0], half, checkpoint={"every": 1, "keep": 1})
    accept = Grants(accept=("checkpoint",))

    def until(step):
        return in_child(lambda: killed_after(step, lambda: go(node, resume=older, grants=accept)))

    assert until(2) == -signal.SIGKILL  # in step 3, before anything new is saved
    assert state.steps(folder) == [2]
    assert until(3) == -signal.SIGKILL
    assert state.steps(folder) == [3] and not list(folder.glob(".later-*"))
    go(node)
    assert outcome(half)[0] == outcome(world[1])[0]


def test_tensorboard_shows_each_step_once_after_a_resume(tiny, world, tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    node, folder = sft(tiny, world[0], tmp_path / "run", log=["tensorboard"]), str(tmp_path / "run" / "tensorboard")

    def steps():
        return [event.step for event in tensorboard.EventAccumulator(folder).Reload().Scalars("train/loss")]

    real = build_training._step_data
    monkeypatch.setattr(build_training, "_step_data", lambda job, contexts, i: real(job, contexts, i // (i < 5)))
    with pytest.raises(ZeroDivisionError):
        go(node)
    assert steps() == [1, 2, 3, 4, 5] and state.steps(tmp_path / "run" / "checkpoints")[0] == 4
    monkeypatch.undo()
    go(node)
    assert steps() == [1, 2, 3, 4, 5, 6]


def test_a_damaged_later_step_does_not_push_out_a_sound_one(tiny, world, half):
    folder = half / "checkpoints"
    (folder / "step-4").rename(folder / "step-6")  # of no run of ours: passed over
    node = sft(tiny, world[0], half, checkpoint={"every": 1, "keep": 1})
    assert in_child(lambda: killed_after(3, lambda: go(node, grants=Grants(accept=("checkpoint",))))) == -signal.SIGKILL
    assert state.steps(folder) == [3]


def test_a_best_step_that_is_gone_is_not_the_result(tiny, world, tmp_path, capfd):
    out, best = tmp_path / "run", {"best": "valid.loss", "every": 2, "keep": 9}
    node = sft(tiny, world[0], out, checkpoint=best)
    assert in_child(lambda: killed_after(4, lambda: go(node))) == -signal.SIGKILL
    facts = json.loads((out / "checkpoints" / "step-4" / "state.json").read_text())
    assert facts["progress"]["best_step"] == 3
    shutil.rmtree(out / "checkpoints" / "step-3")
    made = go(node, resume=str(out / "checkpoints" / "step-4"))
    assert "the best so far, step 3, is gone" in capfd.readouterr().err and made.manifest["best_step"] in (None, 6)


def as_nobody(work):
    def demoted():
        os.setgid(65534)
        os.setuid(65534)
        work()

    return in_child(demoted)


@pytest.fixture
def shared(tmp_path):
    """A folder that every user can reach (pytest's own are 0700)."""
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("kind", ["read-only", "another's", "another's secret", "held files"])
def test_c17_a_folder_of_another_user_is_named_before_the_first_step(kind, shared):
    out, said = shared / "out", shared / "said"
    said.touch(0o666)
    said.chmod(0o666)
    if kind != "read-only":
        claim(out, "auto", Console(quiet=True)).release()
        out.chmod({"another's": 0o755, "another's secret": 0o700, "held files": 0o777}[kind])

    def work():
        try:
            claim(out, "auto", Console(quiet=True))
        except ResourceError as error:
            said.write_text(str(error))
            raise

    assert as_nobody(work) == 5
    doing = "reading" if kind == "another's secret" else "making"
    assert said.read_text().startswith(f"out: {doing} {out} failed: Permission denied; fix: give a folder")
    shared.chmod(0o777)
    if kind == "read-only":
        assert as_nobody(work) == 0  # the control


def test_c17_an_overlong_name_and_a_file_in_the_way_are_named(tmp_path, tiny, world):
    for out in (tmp_path / ("x" * 300), tmp_path / ("y" * 300) / "z"):
        with pytest.raises(ResourceError, match=r"out: (reading|making) .* failed: File name too long"):
            go(sft(tiny, world[0], out))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RecipeError, match="out: .*file is a file"):
        go(sft(tiny, world[0], tmp_path / "file"))
    with pytest.raises(RecipeError, match="out: .*is a file"):
        go(sft(tiny, world[0], tmp_path / "file" / "below"))
    assert (tmp_path / "file").read_text() == "kept" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EROFS, errno.EACCES])
def test_c17_a_handle_that_went_stale_names_path_and_operation(number, tmp_path):
    class Stale(Disk):
        def make(self, folder):
            raise OSError(number, os.strerror(number))

    save(tmp_path, 1)
    with pytest.raises(ResourceError, match=rf"out: saving {tmp_path}/step-2.* failed: {os.strerror(number)}"):
        save(tmp_path, 2, Stale())
    assert state.steps(tmp_path) == [1]
