"""Checkpoints in part: every byte of a manifest, leftovers under every name, files of two steps in one folder."""

import json
import os
import shutil
from itertools import combinations

import pytest
import torch

from llmkit.checkpoint import state
from llmkit.checkpoint.manifest import seal
from llmkit.core.errors import ModelError

FILES = ("tensors-0-of-1.safetensors", "state.json", "manifest.json")


def tensors(step):
    return {"a": torch.full((2, 4), float(step)), "b": torch.tensor([step])}


def save(folder, step):
    return state.save(folder, step, tensors(step), {"step": step})


def test_c5_a_flip_in_any_byte_of_the_manifest_is_named_or_changes_nothing(tmp_path):
    path = save(tmp_path, 12)
    raw, meant = (path / "manifest.json").read_bytes(), json.loads((path / "manifest.json").read_text())
    named = same = 0
    for place in range(len(raw)):
        bit = place % 8
        (path / "manifest.json").write_bytes(raw[:place] + bytes([raw[place] ^ (1 << bit)]) + raw[place + 1 :])
        try:
            found, facts = state.load(path)
        except ModelError as error:
            assert "step-12" in str(error) and "\n" not in str(error)
            named += 1
            continue
        assert json.loads((path / "manifest.json").read_text()) == meant  # white space
        assert facts == {"step": 12} and torch.equal(found["a"], tensors(12)["a"])
        same += 1
    assert named > 300 and same < 9
    (path / "manifest.json").write_bytes(raw)
    assert state.load(path)  # the control


@pytest.mark.parametrize("key", ["world", "step", "format"])
def test_c10_a_manifest_of_another_rank_or_step_is_named(key, tmp_path):
    path = save(tmp_path, 12)
    said = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(said | {key: said[key] + 1}))
    with pytest.raises(ModelError, match="its sha256 is not its own|no checkpoint of this version"):
        state.load(path)
    (path / "manifest.json").write_bytes(seal(said | {key: said[key] + 1}))  # sealed anew, it names no files of its own
    with pytest.raises(ModelError, match="it names|it tells of|the folder is step 12|no checkpoint of this version"):
        state.load(path)


@pytest.mark.parametrize("taken", [names for n in (1, 2) for names in combinations(FILES, n)], ids="+".join)
def test_c10_files_of_two_steps_are_never_one_checkpoint(taken, tmp_path):
    older, path = save(tmp_path, 40), save(tmp_path, 50)
    for name in taken:
        shutil.copy(older / name, path / name)
    with pytest.raises(ModelError, match="step-50"):
        state.load(path)
    said = []
    assert state.newest(tmp_path, said.append)[2] == {"step": 40} and len(said) == 1  # the one before is used


def leave(folder, *names):
    """What a save leaves behind that died: half files, a folder in a folder, nothing that may be written to."""
    for name in names:
        (folder / name / "inner").mkdir(parents=True)
        (folder / name / "tensors-0-of-1.safetensors").write_bytes(b"half")
        (folder / name / "tensors-0-of-1.safetensors").chmod(0o400)


@pytest.mark.parametrize("done", [False, True], ids=["first time", "again"])
def test_c7_leftovers_under_every_name_do_not_stand_in_the_way_of_the_same_step(done, tmp_path):
    save(tmp_path, 1)
    if done:
        state.save(tmp_path, 2, tensors(9), {"step": 2})
    leave(tmp_path, ".tmp-step-2-1", f".tmp-step-2-{os.getpid()}", ".tmp-gone-0", *[".old-step-2"] * done)
    path = save(tmp_path, 2)
    assert torch.equal(state.load(path)[0]["a"], tensors(2)["a"])
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]


def test_c7_a_step_that_was_moved_aside_and_never_replaced_comes_back(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / ".old-step-2")
    assert state.steps(tmp_path) == [1]
    assert state.newest(tmp_path, lambda text: None)[2] == {"step": 2}
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]
