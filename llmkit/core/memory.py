"""How much memory there is, how much was used at most, and what to say when it gave out."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkit_kernels import memory

from llmkit.core.errors import LlmkitError, ResourceError

SHORT = ("can't allocate memory", "cannot allocate memory", "out of memory", "os error 12", "bad_alloc")
"""What torch, the C library, CUDA and libraries in Rust say when an allocation fails."""


HIGH = Path("/proc/self/status")


def device() -> str:
    """Where a run computes: on the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def settle() -> None:
    """What there is now stays: Python's collector looks at it no more. A pass over all that torch and transformers
    import stops a process for 0.2 s, each time that a quarter as much has come."""
    gc.collect()
    gc.freeze()


def peak(device: str) -> int:
    """Largest use so far, in bytes: resident memory on CPU, allocated memory on a GPU."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    if HIGH.exists():  # what getrusage says holds the peak of whoever started this process
        text = HIGH.read_text()
        if (at := text.find("VmHWM:")) >= 0:
            return int(text[at:].split(maxsplit=2)[1]) * 1024
    kilo = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilo if sys.platform == "darwin" else kilo * 1024


def available(device: str) -> int:
    """Bytes that can still be taken: of the GPU, or of the machine, its control group and the address-space limit."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    free = [int(psutil.virtual_memory().available), *_group_room()]
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        free.append(max(0, soft - int(psutil.Process().memory_info().vms)))
    return min(free)


def _group_room() -> list[int]:
    """What a container's limit leaves."""
    root = Path("/sys/fs/cgroup")
    limit, used = root / "memory.max", root / "memory.current"
    try:
        text = limit.read_text().strip()
        return [] if text == "max" else [max(0, int(text) - int(used.read_text()))]
    except (OSError, ValueError):
        return []


def keep_freed_memory() -> None:
    """Sees to it that the memory of tensors is kept when they are freed: a step frees its activations only for the next
    one to fault them in again, a tenth of the step's time on CPU (benchmarks/LOG.md). Without the compiled pool,
    glibc's allocator is told to; other allocators do so by themselves."""
    if not memory.install() or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 << 20)


def is_out_of_memory(cause: BaseException) -> bool:
    """Whether a library's error says that memory gave out, whatever its class."""
    said = str(cause).lower()
    return isinstance(cause, MemoryError) or any(words in said for words in SHORT)


@contextmanager
def out_of_memory_named(device: str, knob: str) -> Iterator[None]:
    """Turns a failed allocation into one line that says what was needed, what there was, and what to lower.

    Raises:
        ResourceError: memory gave out.
    """
    try:
        yield
    except Exception as cause:
        if isinstance(cause, LlmkitError) or not is_out_of_memory(cause):
            raise
        raise _gave_out((str(cause).splitlines() or [""])[0], device, knob) from cause


def _gave_out(text: str, device: str, knob: str) -> ResourceError:
    left = available(device) / 2**20
    return ResourceError(f"memory gave out ({text.strip() or 'no more'}; {left:.0f} MiB are free)", fix=knob)
