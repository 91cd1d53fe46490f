"""Where fetched models live: `LLMKIT_CACHE`, or `~/.cache/llmkit`; ours alone to write."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkit_kernels.build import not_ours, place

from llmkit.core.errors import ResourceError
from llmkit.core.files import refused


def cache() -> Path:
    """The cache's folder, made with mode 0700.

    Raises:
        ResourceError: others may write to it, or it is another user's, or it cannot be made.
    """
    folder = place()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        why = not_ours(folder)
    except OSError as cause:
        raise refused(cause, "making the cache", folder) from cause
    if why:
        raise ResourceError(why, fix=f"chmod go-w {folder}, or name a folder of your own", key="LLMKIT_CACHE")
    return folder


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """One process at a time makes `name`; gives its folder."""
    folder = cache() / "models"
    folder.mkdir(exist_ok=True, mode=0o700)
    with (folder / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / name
