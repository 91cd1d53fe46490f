"""Checkpoints in a store: copied, verified, pruned as here, brought back; its faults do not end a run."""

import json
import os
import shutil
import signal
import threading

import pytest
import torch

from llmkit.checkpoint import mirror, state
from llmkit.checkpoint.mirror import Mirror, fetch
from llmkit.checkpoint.saver import Keep, Saver
from llmkit.core.errors import RecipeError, ResourceError
from llmkit.core.files import Disk
from tests.faults import go, in_child, killed_after, outcome, sft, whole


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "mine" / "checkpoints"


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def run(folder, store, steps, keep=2, best=None, say=print, disk=None):
    with Saver(folder, say, mirror=Mirror(str(store), folder, say), disk=disk or Disk()) as made:
        for step in steps:
            made.save(step, {"a": torch.full((4,), float(step))}, {"step": step, "best": best}, Keep(keep, best))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_store_becomes_as_the_folder_is(folder, store):
    said = []
    run(folder, store, range(1, 6), best=1, say=said.append)
    assert names(folder) == names(store / "mine") == ["step-1", "step-4", "step-5"] and said == []
    for step in (1, 4, 5):
        assert torch.equal(state.load(store / "mine" / f"step-{step}")[0]["a"], torch.full((4,), float(step)))


def test_a_store_in_memory_is_kept_and_read_like_any_other(folder):
    run(folder, "memory://some/place", [1, 2], keep=1)
    shutil.rmtree(folder)
    fetch("memory://some/place", folder, print, lambda facts: None)
    assert names(folder) == ["step-2"] and state.load(folder / "step-2")


def test_a_step_that_is_saved_again_is_copied_again_and_what_is_there_is_not(folder, store):
    run(folder, store, [1, 2])
    before = (store / "mine" / "step-1" / "manifest.json").stat().st_mtime_ns
    (store / "mine" / "step-2" / "manifest.json").write_text("{}")
    run(folder, store, [3], keep=9)
    assert names(store / "mine") == ["step-1", "step-2", "step-3"] and state.load(store / "mine" / "step-2")
    assert (store / "mine" / "step-1" / "manifest.json").stat().st_mtime_ns == before


def test_the_newest_whole_one_and_the_best_are_brought(folder, store):
    run(folder, store, [1, 2, 3, 4], keep=3, best=1)
    (store / "mine" / "step-4" / "manifest.json").unlink()  # half copied
    damaged = store / "mine" / "step-3" / "tensors-0-of-1.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    shutil.rmtree(folder)
    said = []
    fetch(str(store), folder, said.append, lambda facts: facts["best"])
    assert names(folder) == ["step-1", "step-2"]
    assert any("step-3/tensors-0-of-1.safetensors: is damaged" in text for text in said)
    shutil.rmtree(folder)
    fetch(str(store / "nothing"), folder, said.append, lambda facts: None)
    assert not folder.exists()


def test_c16_names_that_lead_out_of_the_folder_are_not_followed(folder, store):
    run(folder, store, [1])
    path = store / "mine" / "step-1" / "manifest.json"
    said = json.loads(path.read_text())
    said["files"]["../../../escaped"] = said["files"].pop("state.json")
    path.write_text(json.dumps(said))
    shutil.rmtree(folder)
    told = []
    fetch(str(store), folder, told.append, lambda facts: None)
    assert not folder.exists() or names(folder) == []
    assert any("is damaged" in text for text in told)


def test_a_store_that_refuses_is_a_notice_and_the_next_checkpoint_brings_all(folder, store):
    store.write_text("a file")
    said = []
    run(folder, store, [1], say=said.append)
    assert len(said) == 1 and said[0].startswith("checkpoint.mirror: ") and "the run goes on" in said[0]
    assert names(folder) == ["step-1"]
    store.unlink()
    run(folder, store, [2], say=said.append)
    assert names(store / "mine") == ["step-1", "step-2"] and len(said) == 1


def test_what_is_written_otherwise_than_meant_is_no_checkpoint_there(folder, store, monkeypatch):
    real = Mirror._pieces
    monkeypatch.setattr(Mirror, "_pieces", lambda self, file: (b"x" * len(piece) for piece in real(self, file)))
    said = []
    run(folder, store, [1], say=said.append)
    assert "is not what was written" in said[0] and not (store / "mine" / "step-1" / "manifest.json").exists()


def test_what_is_being_copied_is_not_taken_away_here(folder, store, monkeypatch):
    held, real, seen = threading.Event(), Mirror._pieces, []

    def slow(self, file):
        seen.append(file)
        assert held.wait(20)
        return real(self, file)

    monkeypatch.setattr(Mirror, "_pieces", slow)
    with Saver(folder, print, mirror=Mirror(str(store), folder, print)) as made:
        for step in (1, 2, 3):
            made.save(step, {"a": torch.zeros(4)}, {"step": step}, Keep(1))
            while not seen:
                pass
        made.wait()
        assert state.steps(folder) == [3, 1]  # keep is 1
        held.set()
    assert names(store / "mine") == ["step-1", "step-3"] or names(store / "mine") == ["step-3"]
    run(folder, store, [4], keep=1)
    assert names(store / "mine") == names(folder) == ["step-4"]


def test_a_stop_does_not_wait_for_ever(folder, store, monkeypatch):
    monkeypatch.setattr(mirror, "GRACE", 0.1)
    held = threading.Event()
    monkeypatch.setattr(Mirror, "_pieces", lambda self, file: iter(held.wait(20) and ()))
    said = []
    made = Mirror(str(store), folder, said.append)
    state.save(folder, 1, {"a": torch.zeros(4)}, {"step": 1})
    made.send(1)
    made.end(in_time=True)
    held.set()
    assert said == ["checkpoint.mirror: not all checkpoints are copied; the next run does it"]


# whole runs


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    return whole(tiny, tmp_path_factory.mktemp("mirrored"))


def test_a_run_goes_on_from_the_store_where_its_folder_is_gone(tiny, world, tmp_path, capfd):
    out, store = tmp_path / "run", tmp_path / "store"
    node = sft(tiny, world[0], out, checkpoint={"every": 2, "keep": 9, "mirror": str(store)})

    def work():
        from llmkit.stages import build_training

        real = Mirror.send
        Mirror.send = lambda self, step: (real(self, step), self.thread and self.thread.join())  # copied at once
        killed_after(4, lambda: go(node))
        build_training.train(node, None)

    assert in_child(work) == -signal.SIGKILL
    assert names(store / "run") == ["step-2", "step-4"]
    shutil.rmtree(out)
    go(node)
    assert "bringing step-4 from " in capfd.readouterr().err
    assert outcome(out)[0] == outcome(world[1])[0]
    assert [line for line in outcome(out)[1] if line["event"] == "train"] == [
        line for line in outcome(world[1])[1] if line["event"] == "train" and line["step"] > 4
    ]
    assert names(store / "run") == names(out / "checkpoints")


def test_a_store_that_cannot_be_read_stops_the_beginning_of_a_run_and_never_begins_anew(tiny, world, tmp_path):
    (tmp_path / "file").write_text("")
    node = sft(tiny, world[0], tmp_path / "run", checkpoint={"mirror": str(tmp_path / "file" / "below")})
    with pytest.raises(ResourceError, match=r"checkpoint.mirror: .* refuses"):
        go(node)
    go(node, resume="never")  # the way out; copying there fails, and is told


def test_a_run_that_begins_anew_takes_no_other_runs_place(tiny, world, folder, tmp_path):
    store = tmp_path / "store"
    run(folder, store, [9])
    node = sft(tiny, world[0], tmp_path / "other" / "mine", checkpoint={"mirror": str(store)})
    with pytest.raises(RecipeError, match="checkpoint.mirror: .*store has checkpoints of a run called mine; fix: name"):
        go(node, resume="never")
    assert names(store / "mine") == ["step-9"]
    control = sft(tiny, world[0], tmp_path / "other" / "new", checkpoint={"mirror": str(store)})
    go(control, resume="never")
    assert names(store / "mine") == ["step-9"] and names(store / "new")


def test_a_place_that_nothing_knows_is_told_before_the_run(tiny, world, tmp_path):
    for url, why in (("nosuch://a/b", "is no place that fsspec knows"), ("s3://a/b", "needs a package")):
        if url[:2] == "s3" and __import__("importlib.util").util.find_spec("s3fs"):
            continue
        with pytest.raises((ResourceError, RecipeError), match=rf"checkpoint.mirror: .*{why}"):
            go(sft(tiny, world[0], tmp_path / "run", checkpoint={"mirror": url}))
    assert os.listdir(tmp_path) == []
