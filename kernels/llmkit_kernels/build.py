"""The compiled rows: made by this machine's C++ compiler at first use, kept by what they were made from."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno")
LINKED = ("-lc10", "-lstdc++")
"""The second where the compiler is gcc: so a library that compiles for itself leaves `CXX` (peft's BOFT)."""
LONGEST = 120
"""Seconds that a compiler may take."""


class Missing(Exception):
    """Why there is no compiled row here."""


@cache
def library(operation: str) -> ctypes.CDLL:
    """The compiled row of an operation, loaded.

    Raises:
        Missing: with the reason; the plain twins do the work then.
    """
    if os.environ.get("LLMKIT_KERNELS") == "off":
        raise Missing("LLMKIT_KERNELS=off")
    if platform.system() != "Linux":
        raise Missing(f"not made for {platform.system()}")
    try:
        ctypes.CDLL(_openmp(), ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(_made(operation)))
    except OSError as cause:
        raise Missing(str(cause).splitlines()[0][:200]) from cause


@cache
def lacks(operation: str) -> str:
    """Why there is no compiled row of an operation here, or nothing."""
    try:
        library(operation)
    except Missing as reason:
        return str(reason)
    return ""


def _openmp() -> str:
    """torch's own OpenMP: a second one would have threads of its own that fight for the same cores."""
    import torch  # noqa: F401  its libraries are to be loaded

    with Path("/proc/self/maps").open() as maps:
        found = {line.split()[-1] for line in maps if "libgomp" in line}
    if len(found) != 1:
        raise Missing(f"torch runs on {len(found)} copies of libgomp")
    return found.pop()


def _made(operation: str) -> Path:
    import torch

    compiler, source = _compiler(), HERE / operation / "cpu.cpp"
    digest = hashlib.sha256(repr((FLAGS, LINKED, _version(compiler), _processor(), torch.__version__)).encode())
    for path in [source, *sorted(HERE.glob("*.h")), *sorted(source.parent.glob("*.h"))]:
        digest.update(path.read_bytes())
    target = _folder() / f"{operation}-{digest.hexdigest()[:24]}.so"
    if not target.exists():
        _compile(compiler, source, target, Path(torch.__file__).parent)
    return target


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "g++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise Missing("no C++ compiler (g++) on the path")


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=LONGEST).stdout


def _processor() -> list[str]:
    """What `-march=native` depends on: a home folder may be shared by unlike machines."""
    with Path("/proc/cpuinfo").open() as info:
        lines = [line.strip() for line in info if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return sorted(set(lines))


def _folder() -> Path:
    folder = place() / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in (folder, folder.parent):
        if why := not_ours(path):
            raise Missing(why)
    return folder


def place() -> Path:
    """Where this user's cache is, or will be: `LLMKIT_CACHE`, or `~/.cache/llmkit`."""
    said = os.environ.get("LLMKIT_CACHE")
    return Path(said).expanduser() if said else Path.home() / ".cache" / "llmkit"


def not_ours(folder: Path) -> str:
    """Why what lies in a folder may not be trusted: somebody else can put files there; or nothing."""
    there = folder.stat()
    if there.st_uid != os.geteuid():
        return f"{folder} belongs to another user ({there.st_uid})"
    return f"others may write to {folder}" if there.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def _compile(compiler: str, source: Path, target: Path, torch: Path) -> None:
    """Compiles next to the target and moves it there: no reader meets half a file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        there, made = str(Path(folder) / "op.o"), Path(folder) / target.name
        # linked without -fopenmp: its symbols come from the copy that torch has loaded
        for command in (
            [compiler, *FLAGS, "-isystem", str(torch / "include"), "-c", str(source), "-o", there],
            [compiler, "-shared", there, "-L", str(torch / "lib"), *LINKED, "-o", str(made)],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
            except subprocess.TimeoutExpired as cause:
                raise Missing(f"{compiler} took more than {LONGEST} s") from cause
            if done.returncode:
                raise Missing(f"{compiler} fails: {(done.stderr.splitlines() or ['no reason given'])[0][:160]}")
        made.replace(target)
