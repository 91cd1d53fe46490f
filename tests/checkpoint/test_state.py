"""Checkpoints: whole or not there, verified, pruned with care; a crash at every write-class call."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from llmkit.checkpoint import state
from llmkit.checkpoint.tensors import write
from llmkit.core.errors import ModelError, ResourceError
from llmkit.core.files import sha256
from tests.disks import Scripted


def tensors(step):
    shared = torch.arange(6, dtype=torch.float32) + step
    return {
        "a": shared.view(2, 3),
        "tied": shared.view(2, 3),
        "turned": shared.view(2, 3).T,
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "odd": torch.tensor([1, 2, 255], dtype=torch.uint8),
        "wide": torch.tensor([step], dtype=torch.int64),
        "scalar": torch.tensor(0.25, dtype=torch.float64),
        "none": torch.zeros(0, 4),
    }


def save(folder, step, disk=None):
    return state.save(folder, step, tensors(step), {"step": step}, *([disk] if disk else []))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def newest(folder):
    return state.newest(folder, lambda text: None)


def test_what_is_saved_is_loaded_and_safetensors_reads_it_too(tmp_path):
    path = save(tmp_path, 3)
    found, meta = state.load(path)
    assert same(found, tensors(3)) and meta == {"step": 3}
    assert same(load_file(path / "tensors-0-of-1.safetensors"), tensors(3))
    said = json.loads((path / "manifest.json").read_text())
    assert said["tensors"]["a"] == {"dtype": "F32", "shape": [2, 3], "slices": [[0, [0, 0], [2, 3]]]}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_save_does_not_die_of_a_float(value, tmp_path):
    path = state.save(tmp_path, 1, tensors(1), {"step": 1, "best": [value]})
    assert state.load(path)[1] == {"step": 1, "best": [repr(value)]} and state.steps(tmp_path) == [1]


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        state.save(tmp_path / "c", 1, tensors(1), {"step": 1, "odd": object()})
    assert not (tmp_path / "c").exists()


def test_a_large_tensor_is_written_in_pieces(tmp_path):
    big = {"big": torch.arange(5_000_001, dtype=torch.float32)}
    assert write(tmp_path / "big.safetensors", big) == sha256(tmp_path / "big.safetensors")
    assert same(load_file(tmp_path / "big.safetensors"), big)


def calls_of_a_save(tmp_path):
    folder = tmp_path / "count"
    save(folder, 1)
    disk = Scripted()
    state.save(folder, 1, tensors(2), {"step": 1}, disk)
    return disk.calls


def test_c1_a_crash_at_every_write_class_call_leaves_the_old_or_the_new(tmp_path):
    total, old, new = calls_of_a_save(tmp_path), 0, 0
    assert total >= 12
    for at in range(1, total + 2):
        folder = tmp_path / f"crash-{at}"
        save(folder, 1)
        pid = os.fork()
        if pid == 0:
            state.save(folder, 1, tensors(2), {"step": 1}, Scripted(at, lambda: os._exit(9)))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == (9 if at <= total else 0)
        found = newest(folder)
        assert found is not None and not list(folder.glob(".*"))
        old += same(found[1], tensors(1))
        new += same(found[1], tensors(2))
        save(folder, 1)  # C7: what was left over does not stand in the way
    assert old >= 2 and new >= 1 and old + new == total + 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_c2_a_disk_that_refuses_any_call_keeps_the_old_one(tmp_path, number):
    def refuse():
        raise OSError(number, os.strerror(number))

    total = calls_of_a_save(tmp_path)
    for at in range(1, total):
        folder = tmp_path / f"refuse-{at}"
        save(folder, 1)
        try:
            save(folder, 2, Scripted(at, refuse))
        except ResourceError as error:
            assert "step-2" in str(error) and " B, failed" in str(error)
        assert not list(folder.glob(".tmp-*"))
        found = newest(folder)
        assert found is not None and (same(found[1], tensors(1)) or same(found[1], tensors(2)))


@pytest.mark.parametrize("name", ["tensors-0-of-1.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "zero", "empty", "remove"])
def test_c5_any_harmed_file_is_named_and_the_one_before_is_used(tmp_path, name, harm):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle] ^= 1
    harms = {"flip": raw, "cut": raw[:middle], "zero": bytes(len(raw)), "empty": b""}
    path.unlink() if harm == "remove" else path.write_bytes(harms[harm])
    said = []
    found = state.newest(tmp_path, said.append)
    assert found[0].name == "step-1" and len(said) == 1 and "step-2" in said[0]
    with pytest.raises(ModelError):
        state.load(tmp_path / "step-2")


def test_c8_the_best_is_never_lost_and_one_is_always_there(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
        state.prune(tmp_path, 1, best=2 if step >= 2 else None)
        assert state.steps(tmp_path) == ([step, 2] if step > 2 else [step])
        assert newest(tmp_path) is not None


def test_c10_files_of_another_step_are_named(tmp_path):
    save(tmp_path, 40)
    save(tmp_path, 50)
    (tmp_path / "step-50" / "state.json").write_bytes((tmp_path / "step-40" / "state.json").read_bytes())
    with pytest.raises(ModelError, match="sha256"):
        state.load(tmp_path / "step-50")
    (tmp_path / "step-40").rename(tmp_path / "step-60")
    with pytest.raises(ModelError, match="the folder is step 60, its manifest step 40"):
        state.load(tmp_path / "step-60")


def test_c16_a_pickle_in_place_of_a_file_is_only_a_damaged_file(tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = save(tmp_path, 1)
    for name in ("tensors-0-of-1.safetensors", "state.json", "manifest.json"):
        (path / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(ModelError):
            state.load(path)
    assert not (tmp_path / "pwned").exists()
    pickle.loads(pickle.dumps(Payload()))  # the control: the payload works
    assert (tmp_path / "pwned").exists()


def test_c17_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="saving .*file/checkpoints"):
        save(tmp_path / "file" / "checkpoints", 1)
    with pytest.raises(ResourceError, match="File name too long"):
        save(tmp_path / ("x" * 300), 1)
