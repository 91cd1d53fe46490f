"""Power loss: what was not synced, contents or names, may be gone; what a save promised is there."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmkit.checkpoint import state
from llmkit.core.artifact import publish
from llmkit.core.console import Console
from llmkit.core.files import Disk, ensure, write_json
from llmkit.core.folder import claim


def tensors(step):
    return {"a": torch.full((8,), float(step))}


class Noted(Disk):
    """The real disk, and a list of what was asked of it."""

    def __init__(self):
        self.done = []

    def write(self, path, parts):
        parts = [bytes(part) for part in parts]
        super().write(path, parts)
        self.done.append(("write", path, b"".join(parts)))

    def make(self, folder):
        super().make(folder)
        self.done.append(("make", folder))

    def rename(self, old, new):
        super().rename(old, new)
        self.done.append(("rename", old, new))

    def sync(self, folder):
        super().sync(folder)
        self.done.append(("sync", folder))

    def remove(self, path):
        super().remove(path)
        self.done.append(("remove", path))


class Folder:
    """The names that a folder has had since its last sync: after a power loss, those of any of these instants."""

    def __init__(self):
        self.pasts = [{}]

    def change(self, **names):
        now = self.pasts[-1] | names
        self.pasts.append({name: held for name, held in now.items() if held is not None})


class Model:
    """A disk in thought. Files are what `Disk.write` promises: their contents are synced, their names are not."""

    def __init__(self, root, syncs=True):
        self.root, self.top, self.syncs = root, Folder(), syncs

    def at(self, path):
        found = self.top
        for part in path.relative_to(self.root).parts:
            found = found.pasts[-1][part]
        return found

    def do(self, what, path, *more):
        if what == "sync":
            self.at(path).pasts = self.at(path).pasts[-1:] if self.syncs else self.at(path).pasts
        elif what == "rename":
            assert path.parent == more[0].parent  # one change, and so one instant
            self.at(path.parent).change(**{more[0].name: self.at(path), path.name: None})
        else:
            self.at(path.parent).change(**{path.name: {"write": more[0] if more else None, "make": Folder()}.get(what)})

    def left(self, choose, folder, found=None):
        """Writes what a power loss leaves; `choose` says which instant of each folder."""
        folder.mkdir()
        for name, held in choose((found or self.top).pasts).items():
            if isinstance(held, Folder):
                self.left(choose, folder / name, held)
            else:
                (folder / name).write_bytes(held)
        return folder


def losses(done, root, into, syncs=True) -> Iterator[tuple[int, Path]]:
    """(calls that were done, the folder that is left) of power losses at every call, with many choices each."""
    for cut in range(len(done) + 1):
        for seed in range(-2, 8):
            model = Model(root, syncs)
            for call in done[:cut]:
                model.do(*call)
            if cut < len(done) and done[cut][0] == "write":  # it goes out in the middle of a write
                model.do("write", done[cut][1], done[cut][2][: len(done[cut][2]) // 2])
            choose = {-2: lambda pasts: pasts[0], -1: lambda pasts: pasts[-1]}.get(seed, random.Random(seed).choice)
            yield cut, model.left(choose, into / f"{cut}-{seed}-{syncs}")


@pytest.fixture
def story(tmp_path):
    """(calls, root, calls done -> the step promised by then): saves, a rotation, and one step that is saved twice."""
    disk, root, promised = Noted(), tmp_path / "disk", {}
    root.mkdir()
    folder = root / "run" / "checkpoints"
    for step in (1, 2, 3, 3):
        state.save(folder, step, tensors(step), {"step": step}, disk)
        promised[len(disk.done)] = step
        state.prune(folder, 1, None, disk)
    return disk.done, root, promised


def newest(left):
    found = state.newest(left / "run" / "checkpoints", lambda text: None)
    if found is None:
        return 0
    assert torch.equal(found[1]["a"], tensors(found[2]["step"])["a"])
    return found[2]["step"]


def test_c4_after_a_power_loss_at_any_call_the_newest_is_whole_and_no_save_that_ended_is_lost(story, tmp_path):
    done, root, promised = story
    (tmp_path / "left").mkdir()
    seen = set()
    for cut, left in losses(done, root, tmp_path / "left"):
        step = newest(left)
        assert step >= max((said for calls, said in promised.items() if calls <= cut), default=0)
        seen.add((cut, step))
    assert len(done) > 30 and {step for _, step in seen} == {0, 1, 2, 3}
    assert len(seen) > len(done) + 1  # power losses at one instant leave this or that: the fault took effect


def test_c4_control_without_syncs_saves_are_lost(story, tmp_path):
    done, root, _ = story
    (tmp_path / "left").mkdir()
    ends = [newest(left) for cut, left in losses(done, root, tmp_path / "left", syncs=False) if cut == len(done)]
    assert min(ends) == 0 and max(ends) == 3


@pytest.fixture
def synced(monkeypatch):
    """What was given to fsync, as (path, bytes it had)."""
    found, real = [], os.fsync

    def fsync(handle):
        real(handle)
        path = Path(f"/proc/self/fd/{handle}").readlink()
        found.append((path, path.stat().st_size if path.is_file() else None))

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def test_c4_what_the_disk_promises_is_asked_of_the_system(synced, tmp_path):
    path = state.save(tmp_path / "a" / "b", 1, tensors(1), {"step": 1})
    files = [(where.name, size) for where, size in synced if size is not None]
    assert sorted(files) == sorted((file.name, file.stat().st_size) for file in path.iterdir())
    folders = [where for where, size in synced if size is None]
    (aside,) = (where for where in folders if where.name.startswith(".tmp-step-1-"))
    assert folders == [tmp_path, tmp_path / "a", aside, tmp_path / "a" / "b"]
    write_json(tmp_path / "status.json", {"step": 1})
    assert [where for where, _ in synced[-2:]] == [tmp_path / f".status.json.{os.getpid()}", tmp_path]


def test_c4_what_a_manifest_names_is_on_the_disk_before_the_manifest(synced, tmp_path):
    (tmp_path / "model" / "inner").mkdir(parents=True)
    for name in ("report.html", "model/a.safetensors", "model/inner/b.json", ".tmp-model-7", "status.json"):
        (tmp_path / name).write_text(name)
    made = publish(tmp_path, {"kind": "sft"})
    where = [path for path, _ in synced]
    assert sorted(made.manifest["files"]) == ["model/a.safetensors", "model/inner/b.json", "report.html"]
    needed = {
        tmp_path,
        tmp_path / "model",
        tmp_path / "model" / "inner",
        *(tmp_path / n for n in made.manifest["files"]),
    }
    assert needed == set(where[: len(needed)]) and where[-1] == tmp_path


def test_c4_the_name_of_a_new_run_is_on_the_disk_before_anything_is_in_it(synced, tmp_path):
    claim(tmp_path / "runs" / "mine", "auto", Console(quiet=True)).release()
    assert [where for where, _ in synced] == [tmp_path, tmp_path / "runs"]
    synced.clear()
    ensure(tmp_path / "runs" / "mine")
    assert synced == []
