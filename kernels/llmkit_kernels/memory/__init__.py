"""The memory of CPU tensors: kept when it is freed, and used again without holes or page faults."""

from __future__ import annotations

from functools import cache

from llmkit_kernels.build import lacks, library


@cache
def install() -> str:
    """From now on this process's new CPU tensors take their memory from one pool; gives why not, or nothing."""
    if why := lacks("memory"):
        return why
    library("memory").memory_install()
    return ""


def trim() -> None:
    """Gives what is free in the pool back to the system."""
    if not lacks("memory"):
        library("memory").memory_trim()
