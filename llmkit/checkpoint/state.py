"""Checkpoints: named tensors and JSON, published whole or not at all, verified when read.

`checkpoints/step-N/` holds `tensors.safetensors`, `state.json` (the loop's own facts) and `manifest.json` (the sha256
of both, and of every tensor its global shape and the slice that this file holds). It is written under another name and
renamed: a reader sees a whole checkpoint or none. Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmkit.checkpoint import tensors as files
from llmkit.core.errors import LlmkitError, ModelError, ResourceError
from llmkit.core.files import DISK, Disk, as_json, ensure, publish, refused
from llmkit.core.folder import steps as steps

FORMAT = 1
LATER = ".later-step-"
FIX = "delete its folder: the one before is used then"


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], disk: Disk = DISK) -> Path:
    """Publishes `folder/step-N`.

    Raises:
        ResourceError: the disk refuses; older checkpoints are untouched.
    """
    final, aside = folder / f"step-{step}", folder / f".tmp-step-{step}-{os.getpid()}"
    needed = files.size(tensors)
    state = (as_json(meta, indent=1) + "\n").encode()
    try:
        clean(folder, disk)
        ensure(folder, disk)
        _room(folder, needed)
        disk.make(aside)
        digests = {"tensors.safetensors": files.write(aside / "tensors.safetensors", tensors, disk)}
        disk.write(aside / "state.json", [state])
        digests["state.json"] = hashlib.sha256(state).hexdigest()
        disk.write(aside / "manifest.json", [_manifest(step, tensors, digests)])
        disk.sync(aside)
        publish(aside, final, disk)
    except OSError as cause:
        shutil.rmtree(aside, ignore_errors=True)
        raise refused(cause, "saving", final, needed) from cause
    return final


def _room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"a checkpoint needs {needed / 2**20:.0f} MiB and {folder} has {free / 2**20:.0f} MiB",
            fix="free some space, or set out to another disk",
            key="out",
        )


def _manifest(step: int, tensors: Mapping[str, Tensor], digests: Mapping[str, str]) -> bytes:
    held = {
        name: {"shape": list(tensor.shape), "slice": [[0, length] for length in tensor.shape]}
        for name, tensor in tensors.items()
    }
    manifest = {"format": FORMAT, "step": step, "rank": 0, "world": 1, "files": digests, "tensors": held}
    return (json.dumps(manifest) + "\n").encode()


def clean(folder: Path, disk: Disk = DISK) -> None:
    """Takes away what a save that died left behind; an older checkpoint moved aside by it comes back."""
    for left in folder.glob(".old-step-*"):
        name = folder / left.name.removeprefix(".old-")
        if name.exists():
            disk.remove(left)
        else:
            disk.rename(left, name)
    for left in folder.glob(".tmp-*"):
        disk.remove(left)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of one checkpoint.

    Raises:
        ModelError: a file is missing, damaged, of another step, or says what no save of ours says.
    """
    try:
        return _load(path)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as cause:
        if "allocate memory" in str(cause):
            raise
        raise ModelError(f"says what no save of ours says ({cause!r:.120})", fix=FIX, file=str(path)) from cause


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    manifest = _json(path / "manifest.json")
    if manifest.get("format") != FORMAT or set(manifest.get("files", {})) != {"tensors.safetensors", "state.json"}:
        raise ModelError("is no checkpoint of this version", fix=FIX, file=str(path / "manifest.json"))
    raw = _bytes(path / "state.json")
    if hashlib.sha256(raw).hexdigest() != manifest["files"]["state.json"]:
        raise ModelError("is damaged: its sha256 is not the manifest's", fix=FIX, file=str(path / "state.json"))
    meta = json.loads(raw)
    named = path.name.removeprefix("step-")
    if {str(manifest["step"]), str(meta.get("step", manifest["step"]))} != {named}:
        raise ModelError(
            f"mixes steps: the folder is step {named}, its manifest step {manifest['step']}", fix=FIX, file=str(path)
        )
    tensors = files.read(path / "tensors.safetensors", manifest["files"]["tensors.safetensors"])
    if manifest != json.loads(_manifest(manifest["step"], tensors, manifest["files"])):  # it has no digest of its own
        raise ModelError("is damaged: it tells of other tensors or ranks", fix=FIX, file=str(path / "manifest.json"))
    return tensors, meta


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise ModelError(f"cannot be read ({cause.strerror})", fix=FIX, file=str(path)) from cause


def _json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(_bytes(path))
    except ValueError as cause:
        raise ModelError("is damaged: it is not JSON", fix=FIX, file=str(path)) from cause
    return said if isinstance(said, dict) else {}


def newest(folder: Path, notice: Callable[[str], None]) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole: (folder, tensors, facts). Each damaged one on the way gets one notice.

    Raises:
        ModelError: there are checkpoints, and none is whole.
    """
    if not folder.is_dir():
        return None
    clean(folder)
    last: LlmkitError | None = None
    for step in steps(folder):
        try:
            return folder / f"step-{step}", *load(folder / f"step-{step}")
        except ModelError as cause:
            notice(f"passing over a checkpoint: {cause.problems[0]}")
            last = cause
    if last is not None:
        raise last
    return None


def set_aside(folder: Path, step: int, disk: Disk = DISK) -> list[int]:
    """Hides the checkpoints that come later than the one that a run goes on from: they are of another course of it, or
    damaged. The first `prune` after a new save removes them; gives their steps.

    Raises:
        ResourceError: the disk refuses.
    """
    later = [other for other in steps(folder) if other > step]
    for other in later:
        path, hidden = folder / f"step-{other}", folder / f"{LATER}{other}"
        try:
            disk.remove(hidden)
            disk.rename(path, hidden)
        except OSError as cause:
            raise refused(cause, "renaming", path) from cause
    return later


def prune(folder: Path, keep: int, best: int | None, disk: Disk = DISK) -> None:
    """Removes all but the newest `keep` checkpoints and the best one, oldest first, and those that were set aside.

    Raises:
        ResourceError: the disk refuses.
    """
    for hidden in folder.glob(f"{LATER}*"):
        try:
            disk.remove(hidden)
        except OSError as cause:
            raise refused(cause, "removing", hidden) from cause
    for step in reversed(steps(folder)[keep:]):
        if step == best:
            continue
        path = folder / f"step-{step}"
        gone = folder / f".tmp-gone-{step}"
        try:
            disk.rename(path, gone)  # never half a checkpoint under its own name
            disk.remove(gone)
        except OSError as cause:
            raise refused(cause, "removing", path) from cause
