"""The memory of CPU tensors: kept when it is freed, and used again without holes or page faults."""

from __future__ import annotations

from ctypes import c_int64
from functools import cache

from llmkit_kernels.build import lacks, library


@cache
def install() -> str:
    """From now on this process's new CPU tensors take their memory from one pool; gives why not, or nothing."""
    if why := lacks("memory"):
        return why
    library("memory").memory_install()
    return ""


def reserve(size: int) -> None:
    """Has `size` bytes at hand before they are needed: the first touch of memory is slow, above all in a virtual
    machine, and is better done before the first step than in it."""
    if size > 0 and not lacks("memory"):
        call = library("memory").memory_reserve
        call.argtypes, call.restype = [c_int64], None
        call(size)


def trim() -> None:
    """Gives what is free in the pool back to the system, addresses too."""
    if not lacks("memory"):
        library("memory").memory_trim()
