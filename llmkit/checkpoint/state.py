"""Checkpoints: named tensors and JSON, published whole or not at all, verified when read.

`checkpoints/step-N/` holds `tensors-R-of-W.safetensors` of each rank R of the W that wrote it, `state.json` (the loop's
own facts) and `manifest.json`: the sha256 of all of them and, of every tensor, its type, its global shape and the
blocks that it lies in, each with the rank whose file has it. All is written under another name and renamed: a reader
sees a whole checkpoint or none, and any number of ranks can read it. Nothing in it can run code. What the first format
wrote, one file `tensors.safetensors`, is still read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from llmkit.checkpoint.agree import agree
from llmkit.checkpoint.deal import deal, layout
from llmkit.checkpoint.draft import Draft, clean, token
from llmkit.checkpoint.held import Held
from llmkit.checkpoint.manifest import NAME, STATE, Manifest, unpack
from llmkit.checkpoint.tensors import header
from llmkit.core.errors import LlmkitError, ModelError
from llmkit.core.files import DISK, Disk, as_json, refused, sha256
from llmkit.core.folder import steps as steps
from llmkit.core.peers import Alone, Peers
from llmkit.core.ranks import Ranks
from llmkit.core.sliced import State, whole

LATER = ".later-step-"
FIX = "delete its folder: the one before is used then"
ALONE = Alone()


def save(folder: Path, step: int, tensors: State, meta: Mapping[str, Any], disk: Disk = DISK) -> Path:
    """Publishes `folder/step-N`, by one process and before it returns; `Saver` is for many, and beside their work.

    Raises:
        ResourceError: the disk refuses; older checkpoints are untouched.
    """
    text = facts_text(meta)
    draft = Draft(folder, step, deal([layout(tensors)]), token=token(), disk=disk)
    try:
        draft.begin()
        held = {name: whole(tensor).tensor for name, tensor in tensors.items() if draft.tensors[name].blocks}
        digest = draft.write(0, held)
        return draft.publish({"tensors-0-of-1.safetensors": digest}, text)
    except LlmkitError:
        draft.drop()
        raise


def facts_text(meta: Mapping[str, Any]) -> bytes:
    """The bytes of `state.json`."""
    return (as_json(meta, indent=1) + "\n").encode()


Found = tuple[Held, dict[str, Any]]


def load(path: Path, peers: Peers = ALONE) -> Found:
    """(tensors, facts) of one checkpoint, called by every rank: each reads a share of the files through and compares
    their digests, and all go on or none does. Tensors are read when they are asked for.

    Raises:
        ModelError: a file is missing, damaged, of another step or of other ranks, or says what no save of ours says.
    """
    found: Found | None = None
    fault: LlmkitError | None = None
    try:
        found = _sound(path, peers.ranks)
    except ModelError as cause:
        fault = cause
    agree(peers, fault)
    if found is None:
        raise ModelError("was not read", fix=FIX, file=str(path))
    return found


def _sound(path: Path, ranks: Ranks) -> Found:
    try:
        return _load(path, ranks)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as cause:
        if "allocate memory" in str(cause):
            raise
        raise ModelError(f"says what no save of ours says ({cause!r:.120})", fix=FIX, file=str(path)) from cause


def _load(path: Path, ranks: Ranks) -> Found:
    manifest = _manifest(path)
    raw = _bytes(path / STATE)
    if hashlib.sha256(raw).hexdigest() != manifest.files[STATE]:
        raise ModelError("is damaged: its sha256 is not the manifest's", fix=FIX, file=str(path / STATE))
    meta = json.loads(raw)
    named = path.name.removeprefix("step-")
    if {str(manifest.step), str(meta.get("step", manifest.step))} != {named}:
        raise ModelError(
            f"mixes steps: the folder is step {named}, its manifest step {manifest.step}", fix=FIX, file=str(path)
        )
    others = {one.name for one in path.glob("tensors*.safetensors")} - set(manifest.parts)
    if others:
        what = f"mixes saves: {min(others)} is none of the {len(manifest.parts)} files that its manifest names"
        raise ModelError(what, fix=FIX, file=str(path))
    for rank in range(ranks.rank, len(manifest.parts), ranks.world):
        _verify(path, manifest, rank)
    return Held(path, manifest), meta


def _manifest(path: Path) -> Manifest:
    try:
        said = json.loads(_bytes(path / NAME))
    except ValueError as cause:
        raise ModelError("is damaged: it is not JSON", fix=FIX, file=str(path / NAME)) from cause
    try:
        found = unpack(said if isinstance(said, dict) else {})
    except ValueError as cause:
        raise ModelError(f"is damaged: {cause}", fix=FIX, file=str(path / NAME)) from cause
    if found is None:
        raise ModelError("is no checkpoint of this version", fix=FIX, file=str(path / NAME))
    return found


def _verify(path: Path, manifest: Manifest, rank: int) -> None:
    """Sees to it that the file of a rank is the one that the manifest names, and holds what it says."""
    file = path / manifest.parts[rank]
    try:
        same = sha256(file) == manifest.files[file.name]
    except OSError as cause:
        raise ModelError(f"cannot be read ({cause.strerror})", fix=FIX, file=str(file)) from cause
    _unmixed(file, manifest, rank, same)
    if not same:
        raise ModelError("is damaged: its sha256 is not the manifest's", fix=FIX, file=str(file))
    entries = header(file)[1]
    if manifest.format == 1:
        said: Any = {name: one.shape for name, one in manifest.tensors.items()}
        found: Any = {name: one.shape for name, one in entries.items()}
    else:
        parts = ((name, one, block) for name, one in manifest.tensors.items() for block in one.blocks)
        said = {name: (one.dtype, block.shape) for name, one, block in parts if block.rank == rank}
        found = {name: (one.dtype, one.shape) for name, one in entries.items()}
    if said != found:
        raise ModelError("is damaged: it tells of other tensors than its files", fix=FIX, file=str(path / NAME))


def _unmixed(file: Path, manifest: Manifest, rank: int, same: bool) -> None:
    """Names a sound file of another save: a file says itself of which step and which rank it is."""
    if manifest.format == 1:
        return
    try:
        notes = header(file)[0]
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        if same:
            raise
        return  # damaged, and said to be so
    meant = {"step": str(manifest.step), "rank": str(rank), "world": str(len(manifest.parts))}
    found = {key: notes.get(key, "?") for key in meant}
    if found != meant:
        what = "mixes saves: it is rank {rank}'s part of {world} of step {step}".format(**found)
        what += ", and its checkpoint has rank {rank}'s of {world} of step {step} there".format(**meant)
        raise ModelError(what, fix=FIX, file=str(file))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise ModelError(f"cannot be read ({cause.strerror})", fix=FIX, file=str(path)) from cause


def newest(
    folder: Path, notice: Callable[[str], None], peers: Peers = ALONE
) -> tuple[Path, Held, dict[str, Any]] | None:
    """The newest checkpoint that is whole: (folder, tensors, facts). Each damaged one on the way gets one notice.
    Called by every rank.

    Raises:
        ModelError: there are checkpoints, and none is whole.
    """
    there: list[int] = []
    if peers.ranks.main and folder.is_dir():
        clean(folder)
        there = steps(folder)
    last: LlmkitError | None = None
    for step in peers.share(there):
        try:
            return folder / f"step-{step}", *load(folder / f"step-{step}", peers)
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


def prune(folder: Path, keep: int, best: int | None, disk: Disk = DISK, spare: Collection[int] = ()) -> None:
    """Removes all but the newest `keep` checkpoints, the best one and those of `spare`, oldest first, and those that
    were set aside.

    Raises:
        ResourceError: the disk refuses.
    """
    for hidden in folder.glob(f"{LATER}*"):
        try:
            disk.remove(hidden)
        except OSError as cause:
            raise refused(cause, "removing", hidden) from cause
    for step in reversed(steps(folder)[keep:]):
        if step == best or step in spare:
            continue
        path = folder / f"step-{step}"
        gone = folder / f".tmp-gone-{step}"
        try:
            disk.rename(path, gone)  # never half a checkpoint under its own name
            disk.remove(gone)
        except OSError as cause:
            raise refused(cause, "removing", path) from cause
