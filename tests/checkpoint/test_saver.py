"""Saving beside the loop: the snapshot is what is saved, one at a time; faults come to light; old ones go after it."""

import os
import threading
import time

import pytest
import torch

from llmkit.checkpoint import saver, state
from llmkit.checkpoint.saver import Keep, Saver
from llmkit.core.errors import DataError, PeerError, ResourceError, Stopped
from llmkit.core.files import Disk
from tests.checkpoint import on_threads


class Gated(Disk):
    """Writes nothing before it may."""

    def __init__(self):
        self.open = threading.Event()

    def write(self, path, parts):
        assert self.open.wait(20)
        super().write(path, parts)


class Broken(Disk):
    """Refuses to write the tensors of step 2."""

    def write(self, path, parts):
        if "step-2" in path.parent.name and path.name.endswith(".safetensors"):
            raise OSError(28, "")
        super().write(path, parts)


def test_what_is_published_is_what_it_was_when_the_loop_went_on(tmp_path):
    disk, weight, order = Gated(), torch.zeros(64), []
    with Saver(tmp_path, order.append, disk=disk) as made:
        began = time.monotonic()
        made.save(1, {"a": weight}, {"step": 1}, Keep(9, first=[lambda: order.append("synced")]))
        assert time.monotonic() - began < 5 and state.steps(tmp_path) == []
        weight += 1
        threading.Timer(0.2, disk.open.set).start()
        made.save(2, {"a": weight}, {"step": 2}, Keep(9))  # waits for the first
        assert state.steps(tmp_path)[-1] == 1 and order == ["synced"]
        weight += 1
    assert state.steps(tmp_path) == [2, 1]
    assert [state.load(tmp_path / f"step-{n}")[0]["a"][0] for n in (1, 2)] == [0, 1]


@pytest.mark.parametrize("background", [True, False])
def test_without_a_background_the_loop_waits(background, tmp_path):
    with Saver(tmp_path, print, background=background, disk=Slow()) as made:
        made.save(1, {"a": torch.zeros(2)}, {"step": 1}, Keep(9))
        assert state.steps(tmp_path) == ([] if background else [1])


class Slow(Disk):
    def write(self, path, parts):
        time.sleep(0.1)
        super().write(path, parts)


def test_the_room_of_a_copy_is_used_again(tmp_path):
    with Saver(tmp_path, print) as made:
        places = []
        for step, size in ((1, 8), (2, 8), (3, 9)):
            made.save(step, {"a": torch.zeros(size), "b": torch.zeros(4, 3).T}, {"step": step}, Keep(9))
            places.append({name: room.data_ptr() for name, room in made.rooms.items()})
    assert places[0] == places[1] and places[1]["b"] == places[2]["b"]
    assert state.load(tmp_path / "step-3")[0]["b"].shape == (3, 4)


@pytest.mark.parametrize("world", [1, 2])
def test_a_fault_of_the_writer_is_raised_at_the_next_save_and_the_old_one_stays(world, tmp_path):
    def work(peers):
        disk = Broken() if peers.ranks.rank == world - 1 else Disk()
        with Saver(tmp_path, print, peers, disk=disk) as made:
            for step in (1, 2):
                made.save(step, {"a": torch.zeros(4), "b": torch.ones(4)}, {"step": step}, Keep(9))
            with pytest.raises(ResourceError, match=rf"saving {tmp_path}/step-2.* failed: No space left on device"):
                made.save(3, {"a": torch.zeros(4), "b": torch.ones(4)}, {"step": 3}, Keep(9))
            made.save(4, {"a": torch.zeros(4), "b": torch.ones(4)}, {"step": 4}, Keep(9))

    assert on_threads(world, work) == [None] * world
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-4"]


@pytest.mark.parametrize("end", [None, Stopped("asked"), DataError("bad")])
def test_at_an_end_a_fault_is_raised_or_told_where_another_one_ends_the_run(end, tmp_path):
    said = []

    def go():
        with Saver(tmp_path, said.append, disk=Broken()) as made:
            for step in (1, 2):
                made.save(step, {"a": torch.zeros(4)}, {"step": step}, Keep(9))
            if end is not None:
                raise end

    with pytest.raises(DataError if isinstance(end, DataError) else ResourceError):
        go()
    assert os.listdir(tmp_path) == ["step-1"]
    assert [text for text in said if text.startswith("step 2 is not saved: out: saving")] == said
    assert len(said) == isinstance(end, DataError)


@pytest.mark.parametrize("end", [None, Stopped("asked"), DataError("bad"), KeyboardInterrupt()])
def test_an_end_waits_for_the_save_under_way(end, tmp_path):
    def work(peers):
        try:
            with Saver(tmp_path, print, peers, disk=Slow()) as made:
                made.save(7, {"a": torch.zeros(4), "b": torch.zeros(4)}, {"step": 7}, Keep(9))
                if end is not None:
                    raise end
        except (Stopped, DataError, KeyboardInterrupt):
            return

    on_threads(2, work)
    assert state.steps(tmp_path) == [7] and state.load(tmp_path / "step-7")


def test_while_bytes_come_the_others_hear_that_this_rank_gets_on(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "SIGN", 0.02)

    class Trickling(Disk):
        def write(self, path, parts):
            with path.open("wb", buffering=0) as file:
                for part in parts:
                    for at in range(0, len(part), 1 << 14):
                        file.write(bytes(part[at : at + (1 << 14)]))
                        time.sleep(0.03)

    def work(peers):
        told = []
        peers.phase = lambda name, step=0: told.append((name, step, threading.current_thread()))
        with Saver(tmp_path, print, peers, disk=Trickling() if peers.ranks.rank else Disk()) as made:
            made.save(7, {"a": torch.ones(1 << 16), "b": torch.ones(1 << 16)}, {"step": 7}, Keep(9))
            before = len(told)
        assert {one[:2] for one in told} == {("save", 7)} and {one[2] for one in told} == {threading.current_thread()}
        assert len(told) - before > 3 or not peers.ranks.rank  # who has written waits for the others' word

    assert on_threads(2, work) == [None, None] and state.steps(tmp_path) == [7]


def test_a_run_that_ends_by_a_fault_does_not_wait_for_a_rank_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "HURRY", 0.1)
    said = []

    def work(peers):
        disk = Gated() if peers.ranks.rank else Disk()
        if peers.ranks.rank:
            threading.Timer(1.5, disk.open.set).start()  # so that the test ends
        with Saver(tmp_path, said.append, peers, disk=disk) as made:
            made.save(7, {"a": torch.zeros(4), "b": torch.zeros(4)}, {"step": 7}, Keep(9))
            began = time.monotonic()
            try:
                raise PeerError("rank 1 died")
            finally:
                made._let_go()
                if peers.ranks.main:
                    assert time.monotonic() - began < 1.4

    faults = on_threads(2, work)
    assert [str(fault) for fault in faults] == ["rank 1 died"] * 2
    assert any(text.startswith("step 7 is not saved: saving") for text in said) and state.steps(tmp_path) == []


def test_c8_old_ones_go_when_the_new_one_is_there_and_the_best_stays(tmp_path):
    seen = []

    class Looking(Slow):
        def remove(self, path):
            if path.name.startswith(".tmp-gone"):
                seen.append((path.name, state.steps(tmp_path)))
            super().remove(path)

    with Saver(tmp_path, print, disk=Looking()) as made:
        for step, best in ((1, None), (2, 2), (3, 2), (4, 4), (5, 4)):
            made.save(step, {"a": torch.full((4,), float(step))}, {"step": step}, Keep(1, best))
    assert seen == [(".tmp-gone-1", [2]), (".tmp-gone-2", [4, 3]), (".tmp-gone-3", [4])]
    assert state.steps(tmp_path) == [5, 4]


def test_facts_that_are_none_are_refused_at_once_and_nothing_is_left(tmp_path):
    with Saver(tmp_path / "c", print) as made, pytest.raises(TypeError):
        made.save(1, {"a": torch.zeros(1)}, {"step": 1, "odd": object()}, Keep(1))
    assert not (tmp_path / "c").exists()
