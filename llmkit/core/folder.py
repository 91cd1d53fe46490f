"""A run's folder: claimed by one process at a time, with a status that tells what became of it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmkit.core.console import Console
from llmkit.core.errors import LlmkitError, RecipeError, ResourceError
from llmkit.core.files import DISK, ensure, refused, write_atomic, write_json, write_over

NOTES = {"recipe.yaml", "resolved.yaml", "status.json", "run.log", "lint.json", ".trackers.json", ".lock", "ranks"}
"""What a run's folder holds before the run has done anything that is worth keeping."""
OURS = NOTES | {"manifest.json", "metrics.jsonl"}


@dataclass
class Claim:
    """A held folder. `before` is the status that the run before left, or nothing."""

    folder: Path
    lock: IO[str]
    before: Mapping[str, Any]
    there: frozenset[str]
    """What it held already."""
    made: tuple[Path, ...]
    """The folders that were not there, innermost first: it, and those around it."""

    def status(self, state: str, step: int = 0, code: int = 0, why: str = "", **more: Any) -> None:
        """Writes `status.json`: running, done, stopped or failed."""
        path = self.folder / "status.json"
        said = {"state": state, "step": step, "exit_code": code, "why": why, **more}
        try:
            write_json(path, said)
        except ResourceError:
            if not path.is_file():
                raise
            write_over(path, said)  # where a disk is full, what has failed would be running for ever

    def forget(self, notes: Sequence[Path] = ()) -> bool:
        """Takes away what came with the claim, and `notes` in folders that did, if no more than notes came of it."""
        found = set(_names(self.folder))
        if (self.there - {".lock"}) or (found - NOTES):
            return False
        for path in [*(self.folder / name for name in found - self.there), *notes]:
            if path.parent == self.folder or path.parent in self.made:
                DISK.remove(path)
        for folder in self.made:
            with suppress(OSError):  # somebody else's is in it by now
                folder.rmdir()
        return True

    def release(self) -> None:
        """Lets the next process have it."""
        self.lock.close()


def read_status(folder: Path) -> dict[str, Any]:
    """What `status.json` says, or nothing."""
    try:
        said = json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def claim(folder: Path, resume: str, console: Console) -> Claim:
    """Takes a run's folder for this process.

    Raises:
        RecipeError: a live process holds it, it is somebody else's, or `--resume never` meets one in use.
        ResourceError: it cannot be written.
    """
    there = _names(folder)
    before = read_status(folder)
    made = tuple(path for path in (folder, *folder.parents) if not path.exists())
    if there and resume == "never" and there != [".lock"]:
        raise RecipeError(f"{folder} is not empty and --resume is never", fix="name a new folder", key="out")
    if there and not OURS & set(there):
        raise RecipeError(f"{folder} holds files that are no run's ({there[0]})", fix="name a new folder", key="out")
    try:
        ensure(folder)
        lock = (folder / ".lock").open("a+")
    except OSError as cause:
        raise refused(cause, "making", folder) from cause
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as cause:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise RecipeError(
            f"{folder} is in use by {holder}", fix="wait for it, or name another folder", key="out"
        ) from cause
    _clean(folder)
    _take(lock, folder, before, console)
    return Claim(folder, lock, before, frozenset(there), made)


def shared(folder: Path, name: str, seconds: float = 10.0) -> None:
    """Sees to it that the folder which the main rank holds is there for rank `name` too; a file system that hosts share
    may show it late.

    Raises:
        ResourceError: it is not.
    """
    until = time.monotonic() + seconds
    while not (folder / ".lock").exists():
        if time.monotonic() > until:
            what = f"{name} does not see {folder}, which the main rank holds"
            raise ResourceError(what, fix="put out on a disk that all hosts share", key="out")
        time.sleep(0.05)


def inherit(folder: Path, cause: LlmkitError) -> bool | None:
    """Leaves the status of a run whose process died and could not; says whether it was there to be left.

    None where a process that lives holds the folder: nobody else writes then.
    """
    for _ in range(20):  # forks of the one that died keep its lock for a moment
        try:
            with (folder / ".lock").open("a+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if read_status(folder).get("state") != "running":
                    return False
                saved = steps(folder / "checkpoints")[:1]
                said = {"state": "failed", "step": saved[0] if saved else 0, "exit_code": cause.code}
                write_json(folder / "status.json", said | {"why": str(cause).splitlines()[0]})
                return True
        except FileNotFoundError:
            return None
        except BlockingIOError:
            time.sleep(0.1)
    return None


def _take(lock: IO[str], folder: Path, before: Mapping[str, Any], console: Console) -> None:
    """Puts this process's name on a lock that it holds."""
    if before.get("state") == "running":
        lock.seek(0)
        console.notice(f"{folder} was left by {lock.read().strip() or 'a dead process'}, which is gone: taking it over")
    lock.seek(0)
    lock.truncate()
    lock.write(f"{platform.node()}, pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    lock.flush()


def _clean(folder: Path) -> None:
    """Takes away what a process that died was about to put in its place."""
    for path in folder.iterdir():
        if re.fullmatch(r"\.(tmp|old)-.+|\..+\.\d+", path.name):
            try:
                DISK.remove(path)
            except OSError as cause:
                raise refused(cause, "removing", path) from cause


def _names(folder: Path) -> list[str]:
    """What lies in a folder; nothing where there is none yet."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError as cause:
        raise RecipeError(f"{folder} is a file", fix="name a new folder", key="out") from cause
    except OSError as cause:
        raise refused(cause, "reading", folder) from cause


def is_held(folder: Path) -> bool:
    """Whether a live process holds a run's folder: what the claim of a next one asks too."""
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as cause:
        return not isinstance(cause, FileNotFoundError)
    return False


def write_recipe(folder: Path, text: str, resolved: str) -> None:
    """The recipe as written and as resolved."""
    write_atomic(folder / "recipe.yaml", text.encode())
    write_atomic(folder / "resolved.yaml", resolved.encode())


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a folder of them, newest first."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir())
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of all that differs between two trees of JSON values."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(old.keys() | new.keys()):
        a, b, path = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{path}.")
        elif a != b:
            found.append((path, a, b))
    return found
