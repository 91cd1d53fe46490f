"""Checkpoints of many ranks: who writes what, what any number of them reads, and what is mixed up or of old."""

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

from llmkit.checkpoint import saver, state
from llmkit.checkpoint.deal import deal, layout, tiles
from llmkit.checkpoint.manifest import seal
from llmkit.checkpoint.saver import Keep, Saver
from llmkit.checkpoint.tensors import write
from llmkit.core.errors import ModelError, PeerError, ResourceError
from llmkit.core.files import Disk
from llmkit.core.sliced import Slice
from tests.checkpoint import Files, forked, on_threads
from tests.disks import Scripted

CUTS = {2: [0, 7, 7], 3: [0, 2, 2, 7]}
"""Where 7 rows are cut: unevenly, and into an empty block."""


def wholes(step=0):
    """The state of all ranks together."""
    return {
        "rows": torch.arange(35.0).view(7, 5) + step,
        "half": torch.arange(14).view(7, 2).to(torch.bfloat16) + step,
        "grid": torch.arange(24, dtype=torch.int64).view(4, 6) + step,
        "everywhere": torch.arange(100.0) + step,
        "scalar": torch.tensor(0.5 + step, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 3),
    }


def held(rank, world, step=0):
    """What a rank holds of it: rows in slices, a tensor in columns, the rest whole."""
    found = dict(wholes(step))
    if world == 1:
        return found
    low, high = CUTS.get(world, [0, 1, 3, 5, 7])[rank : rank + 2]
    for name in ("rows", "half"):
        found[name] = Slice(found[name][low:high], (7, *found[name].shape[1:]), (low, 0))
    wide = 6 // world
    left, right = rank * wide, 6 if rank == world - 1 else (rank + 1) * wide
    found["grid"] = Slice(found["grid"][:, left:right], (4, 6), (0, left))
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def saved(folder, world, step, disk=None, **more):
    """Saves by `world` ranks, which are threads; what each of them raised."""

    def work(peers):
        with Saver(folder, lambda text: None, peers, disk=(disk or {}).get(peers.ranks.rank, Disk()), **more) as made:
            made.save(step, held(peers.ranks.rank, world, step), {"step": step}, Keep(9))

    return on_threads(world, work)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("writers", [1, 2, 3, 4])
def test_what_some_ranks_write_any_number_reads(writers, background, tmp_path):
    assert saved(tmp_path, writers, 5, background=background) == [None] * writers
    (path,) = tmp_path.iterdir()
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "state.json",
        *(f"tensors-{rank}-of-{writers}.safetensors" for rank in range(writers)),
    ]
    for readers in (1, 2, 4):
        for found, facts in on_threads(readers, lambda peers: state.load(path, peers)):
            assert same(found, wholes(5)) and facts == {"step": 5}
    assert not same(state.load(path)[0], wholes(6))  # the control


def test_a_block_is_read_alone_across_the_files(tmp_path):
    saved(tmp_path, 3, 1)
    found, _ = state.load(tmp_path / "step-1")
    for name, start, shape in (("rows", (1, 1), (4, 3)), ("grid", (1, 1), (2, 5)), ("rows", (3, 0), (0, 5))):
        block = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        assert torch.equal(found.part(name, start, shape), wholes(1)[name][block])
    assert found.part("scalar", (), ()) == 1.5 and found.shape("grid") == (4, 6)
    assert sorted(found.without("r")) == sorted(set(wholes()) - {"rows"})
    for start, shape in (((6, 0), (2, 5)), ((-1, 0), (1, 5)), ((0,), (7,))):
        with pytest.raises(ValueError):
            found.part("rows", start, shape)


def test_a_block_touches_its_own_bytes_alone(tmp_path):
    state.save(tmp_path, 1, {"big": torch.zeros(4096, 4096)}, {"step": 1})
    found, _ = state.load(tmp_path / "step-1")

    def resident():
        lines = Path("/proc/self/smaps").read_text().split("tensors-0-of-1.safetensors\n")[1:]
        return sum(int(part.split("Rss:")[1].split()[0]) for part in lines)

    found.part("big", (2048, 0), (1, 4096))
    assert 0 < resident() < 1024  # KiB, of 65536
    found["big"]
    assert resident() > 60000  # the control: it measures


def test_files_are_about_equally_large_and_nothing_is_written_twice():
    everywhere = {f"layer.{i}": torch.zeros(100 + i) for i in range(50)}
    for world in (2, 3, 8):
        dealt = deal([layout(everywhere)] * world)
        blocks = [block for one in dealt.values() for block in one.blocks]
        load = Counter({block.rank: 0 for block in blocks})
        for block in blocks:
            load[block.rank] += block.shape[0]
        assert len(blocks) == 50 and len(load) == world
        assert max(load.values()) - min(load.values()) < 150
    several = [layout({"a": Slice(torch.zeros(2), (4,), (rank // 2 * 2,))}) for rank in range(4)]  # two replicas each
    assert [(block.rank, block.start) for block in deal(several)["a"].blocks] == [(0, (0,)), (2, (2,))]


@pytest.mark.parametrize(
    ("blocks", "whole"),
    [
        ([((0, 0), (2, 2)), ((0, 2), (2, 1)), ((2, 0), (1, 3))], True),
        ([((0,), (2,)), ((2,), (2,))], False),
        ([((0,), (2,)), ((1,), (2,))], False),
        ([((0,), (1,)), ((2,), (1,))], False),
        ([], False),
    ],
)
def test_blocks_make_up_a_whole_or_do_not(blocks, whole):
    assert tiles(blocks, ((0,) * len((blocks or [((0,),)])[0][0]), (3,) * len((blocks or [((0,),)])[0][0]))) == whole


def test_ranks_that_hold_no_whole_or_hold_it_differently_are_named(tmp_path):
    part = [layout({"a": Slice(torch.zeros(2), (5,), (2 * rank,))}) for rank in range(2)]
    with pytest.raises(PeerError, match=r"parts of a do not make up its shape \[5\]"):
        deal(part)
    with pytest.raises(PeerError, match="rank 1 holds a as"):
        deal([layout({"a": torch.zeros(2)}), layout({"a": torch.zeros(2, dtype=torch.int64)})])


def test_each_rank_reads_its_share_of_the_files_through(tmp_path, monkeypatch):
    saved(tmp_path, 4, 1)
    read, real = [], state.sha256
    monkeypatch.setattr(state, "sha256", lambda path: read.append(path.name) or real(path))
    on_threads(3, lambda peers: state.load(tmp_path / "step-1", peers))
    assert sorted(read) == [f"tensors-{rank}-of-4.safetensors" for rank in range(4)]


@pytest.mark.parametrize("rank", range(3))
def test_c5_a_file_that_one_rank_finds_damaged_is_refused_by_all_and_the_one_before_is_used(rank, tmp_path):
    saved(tmp_path, 3, 1)
    saved(tmp_path, 3, 2)
    path = tmp_path / "step-2" / f"tensors-{rank}-of-3.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    for fault in on_threads(2, lambda peers: state.load(tmp_path / "step-2", peers)):
        assert isinstance(fault, ModelError) and f"{path.name}: " in str(fault) and "is damaged" in str(fault)
    for found in on_threads(2, lambda peers: state.newest(tmp_path, lambda text: None, peers)):
        assert found[0].name == "step-1" and same(found[1], wholes(1))


def reseal(path):
    said = json.loads((path / "manifest.json").read_text())
    for name in said["files"]:
        said["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "manifest.json").write_bytes(seal(said))


@pytest.mark.parametrize("sealed", [False, True])
def test_c10_parts_of_two_steps_ranks_or_worlds_are_named(sealed, tmp_path):
    for step in (40, 50):
        saved(tmp_path, 2, step)
    path = tmp_path / "step-50"
    name = "tensors-1-of-2.safetensors"
    shutil.copy(tmp_path / "step-40" / name, path / name)
    if sealed:
        reseal(path)
    with pytest.raises(
        ModelError, match=r"rank 1's part of 2 of step 40, and its checkpoint has rank 1's of 2 of step 50"
    ):
        state.load(path)
    shutil.copy(path / "tensors-0-of-2.safetensors", path / name)
    with pytest.raises(ModelError, match=r"rank 0's part of 2 of step 50, and its checkpoint has rank 1's"):
        state.load(path)
    saved(tmp_path, 3, 50)
    shutil.copy(tmp_path / "step-40" / name, path / name)
    with pytest.raises(ModelError, match=r"mixes saves: tensors-1-of-2.safetensors is none of the 3 files"):
        state.load(path)
    (path / name).unlink()
    shutil.copy(tmp_path / "step-40" / name, path / "tensors-1-of-3.safetensors")
    with pytest.raises(ModelError, match=r"rank 1's part of 2 of step 40, and its checkpoint has rank 1's of 3 of"):
        state.load(path)
    saved(tmp_path, 3, 50)
    assert state.load(path)  # the control


def test_a_checkpoint_of_the_first_format_is_still_read(tmp_path):
    path, tensors = tmp_path / "step-4", {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([7], dtype=torch.uint8)}
    path.mkdir()
    (path / "state.json").write_text('{"step": 4}')
    write(path / "tensors.safetensors", tensors)
    digest = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in os.listdir(path)}
    shapes = {name: {"shape": list(t.shape), "slice": [[0, n] for n in t.shape]} for name, t in tensors.items()}
    said = {"format": 1, "step": 4, "rank": 0, "world": 1, "files": digest, "tensors": shapes}
    (path / "manifest.json").write_text(json.dumps(said))
    for found, facts in on_threads(2, lambda peers: state.load(path, peers)):
        assert same(found, tensors) and facts == {"step": 4}
        assert torch.equal(found.part("a", (1, 1), (1, 2)), torch.tensor([[4.0, 5.0]]))
    shapes["a"]["shape"] = [3, 2]
    (path / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="says what no save of ours says|tells of"):
        state.load(path)
    (path / "manifest.json").write_text(json.dumps(said | {"format": 3}))
    with pytest.raises(ModelError, match="is no checkpoint of this version; fix: delete its folder"):
        state.load(path)


class Refusing(Disk):
    """Refuses the `at`-th call with `number`, and all that come after it where it is `stubborn`."""

    def __init__(self, at, number=errno.ENOSPC, stubborn=False):
        self.at, self.number, self.stubborn, self.calls = at, number, stubborn, 0

    def _now(self):
        self.calls += 1
        if self.calls == self.at or (self.stubborn and self.calls > self.at):
            raise OSError(self.number, os.strerror(self.number))

    def write(self, path, parts):
        self._now()
        super().write(path, parts)

    def rename(self, old, new):
        self._now()
        super().rename(old, new)


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 2])
def test_c2_a_disk_that_refuses_one_rank_is_told_to_all_and_the_old_one_stays(rank, at, stubborn, tmp_path):
    saved(tmp_path, 3, 1)
    faults = saved(tmp_path, 3, 2, {rank: Refusing(at, stubborn=stubborn)})
    for who, fault in enumerate(faults):
        assert isinstance(fault, ResourceError) and f"saving {tmp_path}/step-2" in str(fault)
        assert "No space left on device" in str(fault) and (who == rank or f"rank {rank} (" in str(fault))
    assert os.listdir(tmp_path) == ["step-1"]
    assert saved(tmp_path, 3, 2, {rank: Refusing(4, stubborn=stubborn)}) == [None] * 3  # the control: three calls
    assert same(state.load(tmp_path / "step-2")[0], wholes(2))


@pytest.mark.parametrize("at", range(1, 6))
def test_c2_a_disk_that_refuses_the_main_rank_is_told_to_all(at, tmp_path):
    saved(tmp_path, 2, 1)
    faults = saved(tmp_path, 2, 2, {0: Refusing(at)})
    if at < 5:  # the part, state.json, the manifest, the rename
        assert all(isinstance(fault, ResourceError) and "No space left" in str(fault) for fault in faults)
        assert os.listdir(tmp_path) == ["step-1"]
    else:
        assert faults == [None, None] and sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]


class Crash(Scripted):
    """The process dies at a call, before it or in the middle of it."""

    def write(self, path, parts):
        self.now()
        Disk.write(self, path, (part for part in parts if not self.now()))


@pytest.mark.parametrize("victim", [0, 1])
def test_c1_a_rank_that_is_killed_at_any_call_leaves_the_old_or_the_new(victim, tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "HURRY", 0.05)
    ends, found, at = Counter(), Counter(), 0
    while not ends[0]:
        at += 1
        folder, words = tmp_path / f"{at}", tmp_path / f"words-{at}"
        words.mkdir()
        saved(folder, 2, 1)

        def work(rank, folder=folder, words=words, disk=Crash(at)):
            peers = Files(rank, 2, words)
            with Saver(folder, lambda text: None, peers, disk=disk if rank == victim else Disk()) as made:
                made.save(2, held(rank, 2, 2), {"step": 2}, Keep(9))

        codes = forked(2, work)
        ends[codes[victim]] += 1
        assert codes[1 - victim] == (6 if codes[victim] else 0)
        step = state.newest(folder, lambda text: None)
        assert same(step[1], wholes(step[2]["step"]))
        found[step[2]["step"]] += 1
        assert saved(folder, 2, 2) == [None, None]  # what was left over does not stand in the way
        assert sorted(os.listdir(folder)) == ["step-1", "step-2"]
    assert ends[-signal.SIGKILL] >= (16 if victim == 0 else 6) and found[1] >= 6 and found[2] >= 1


def test_a_rank_that_never_writes_is_not_waited_for_without_end(tmp_path, monkeypatch):
    class Silent(Disk):
        def rename(self, old, new):
            pass  # its word does not arrive

    monkeypatch.setattr(saver, "PATIENCE", 0.2)
    for fault in saved(tmp_path, 2, 1, {1: Silent()}):
        assert isinstance(fault, PeerError) and "step-1 failed: rank 1 has not written its part" in str(fault)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("world", [10**12, -1, 1.5, "2", None])
def test_a_manifest_that_tells_of_ranks_whose_files_it_does_not_name_is_damaged(world, tmp_path):
    path = state.save(tmp_path, 1, {"a": torch.zeros(2)}, {"step": 1})
    said = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_bytes(seal(said | {"world": world}))
    with pytest.raises(ModelError, match="is damaged: it tells of .* ranks and names 2 files"):
        state.load(path)
