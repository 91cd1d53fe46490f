"""Where fetched models live: `LLMKIT_CACHE`, or `~/.cache/llmkit`; ours alone to write."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkit.core.errors import ResourceError
from llmkit.core.files import refused


def cache() -> Path:
    """The cache's folder, made with mode 0700.

    Raises:
        ResourceError: others may write to it, or it cannot be made.
    """
    said = os.environ.get("LLMKIT_CACHE")
    folder = Path(said).expanduser() if said else Path.home() / ".cache" / "llmkit"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        mode = folder.stat().st_mode
    except OSError as cause:
        raise refused(cause, "making the cache", folder) from cause
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ResourceError(f"others may write to the cache {folder}", fix=f"chmod go-w {folder}", key="LLMKIT_CACHE")
    return folder


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """One process at a time makes `name`; gives its folder."""
    folder = cache() / "models"
    folder.mkdir(exist_ok=True, mode=0o700)
    with (folder / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / name
