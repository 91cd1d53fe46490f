"""A run's folder: claimed by one process at a time, with a status that tells what became of it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmkit.core.console import Console
from llmkit.core.errors import RecipeError
from llmkit.core.files import ensure, refused, write_atomic, write_json

OURS = {"recipe.yaml", "resolved.yaml", "status.json", "manifest.json", "metrics.jsonl", ".lock"}


@dataclass
class Claim:
    """A held folder. `status` is what the run before left, or nothing."""

    folder: Path
    lock: IO[str]
    before: Mapping[str, Any]

    def status(self, state: str, step: int = 0, code: int = 0, why: str = "", **more: Any) -> None:
        """Writes `status.json`: running, done, stopped or failed."""
        write_json(self.folder / "status.json", {"state": state, "step": step, "exit_code": code, "why": why, **more})

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
    if before.get("state") == "running":
        lock.seek(0)
        console.notice(f"{folder} was left by {lock.read().strip() or 'a dead process'}, which is gone: taking it over")
    lock.seek(0)
    lock.truncate()
    lock.write(f"{platform.node()}, pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    lock.flush()
    return Claim(folder, lock, before)


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


def write_recipe(folder: Path, text: str, resolved: str) -> None:
    """The recipe as written and as resolved."""
    write_atomic(folder / "recipe.yaml", text.encode())
    write_atomic(folder / "resolved.yaml", resolved.encode())


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
