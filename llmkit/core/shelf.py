"""A shelf of immutable entries in the cache: folders that are named by all that went into them.

An entry is written aside under a lock, hashed, and renamed: a reader sees all of it or nothing. What does not agree
with its hashes is taken away and made again. Locks are the kernel's, so that those of a dead process are free; a live
holder that has not moved for `PATIENCE` seconds is not waited for: two may then make the same entry, and the first one
stays.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from llmkit.core.cache import cache
from llmkit.core.errors import RecipeError, ResourceError
from llmkit.core.files import sha256
from llmkit.core.scalars import UNITS

if TYPE_CHECKING:
    import numpy as np

LOG = logging.getLogger("llmkit")
MANIFEST = "manifest.json"
SIZE = "LLMKIT_CACHE_SIZE"
USUAL = 32 << 30
"""Bytes that a shelf may hold."""
PATIENCE = 60.0
"""Seconds without a sign of life after which the maker of an entry is not waited for."""
TRIES = 3
ASIDE = ".aside-"


@dataclass(frozen=True)
class Held:
    """An entry in use: it is not taken away while this lives."""

    folder: Path
    facts: Mapping[str, Any]
    """What its maker said of it."""
    sizes: Mapping[str, int]
    """Bytes of each file."""
    _lock: int

    def __del__(self) -> None:
        with suppress(OSError):
            os.close(self._lock)


Make = Callable[[Path, Callable[[], None]], Mapping[str, Any]]
"""(an empty folder, a sign of life) -> facts: writes the files of an entry."""


def key_of(facts: Mapping[str, Any]) -> str:
    """The name of the entry that is made of these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def entry(shelf: str, key: str, make: Make) -> Iterator[Held]:
    """The entry `key` of a shelf, found or made; where `LLMKIT_CACHE_SIZE` is 0 it is gone when the block ends.

    Raises:
        ResourceError: the cache cannot be written, or others may write to it.
    """
    most, root = limit(), _root(shelf)
    if not most:
        with _aside(root, key) as alone:
            yield _found_or_made(alone, root, key, make)
        return
    yield _found_or_made(root, root, key, make)
    sweep(shelf, most)


def _found_or_made(root: Path, locks: Path, key: str, make: Make) -> Held:
    held = _found(root / key, key, mend=False)
    for _ in range(TRIES):
        if held is not None:
            break
        with _turn(locks / f".lock-{key}") as alive:
            held = _found(root / key, key, mend=True)
            if held is None:
                with _made(root, key, make, alive):
                    held = _found(root / key, key, mend=True)
    if held is not None:
        return held
    raise ResourceError(
        f"what is written to {root} is not what is read there", fix="check the disk", key="LLMKIT_CACHE"
    )


def limit() -> int:
    """Bytes that a shelf may hold.

    Raises:
        RecipeError: the environment says what is no size.
    """
    said = os.environ.get(SIZE, "").strip()
    if not said:
        return USUAL
    number = said.rstrip("BKMGTi")
    try:
        return int(float(number) * ({"": 1} | UNITS["bytes"])[said[len(number) :]])
    except (ValueError, LookupError, OverflowError) as cause:
        raise RecipeError(f"{said!r} is no size", fix="write bytes, or 20GiB", key=SIZE) from cause


def sweep(shelf: str, most: int) -> None:
    """Takes away what dead makers left and, beyond `most` bytes, the entries that were not used for longest."""
    root = _root(shelf)
    for left in root.glob(f"{ASIDE}*"):
        _drop(left, left)
    found: list[tuple[float, int, Path]] = []
    for path in root.glob(f"[!.]*/{MANIFEST}"):
        with suppress(FileNotFoundError):  # another one's sweep was faster
            size = sum(file.stat().st_size for file in path.parent.iterdir())
            found.append((path.stat().st_mtime, size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most:
            return
        if _drop(path, path.parent):
            total -= size


def _drop(lock: Path, folder: Path) -> bool:
    """Removes what nobody holds; whether it is gone."""
    try:
        handle = os.open(lock, os.O_RDONLY)
    except OSError as cause:
        return cause.errno == errno.ENOENT
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(lock, handle):  # or else it is gone, and what is there now is another one
            _move(folder)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _is(path: Path, handle: int) -> bool:
    """Whether what is open is still what stands there: between opening and locking it may be taken away."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _move(folder: Path) -> None:
    """Takes a folder away: never half an entry under its own name. Who has it mapped keeps what is mapped."""
    gone = folder.with_name(f"{ASIDE}gone-{secrets.token_hex(6)}")
    with suppress(FileNotFoundError):  # another one took it
        folder.replace(gone)
    shutil.rmtree(gone, ignore_errors=True)


def spilled(parts: Iterable[np.ndarray[Any, Any]], kind: Any) -> np.ndarray[Any, Any]:
    """Arrays end to end in a file without a name: as large as the disk, and gone with the process."""
    import numpy as np

    try:
        with TemporaryFile(dir=cache()) as file:
            for part in parts:
                file.write(part.astype(kind, copy=False).tobytes())
            file.flush()
            if not file.tell():
                return np.empty(0, kind)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=kind)
    except OSError as cause:
        raise _refused(cause, cache()) from cause


def _root(shelf: str) -> Path:
    root = cache() / shelf
    try:
        root.mkdir(exist_ok=True, mode=0o700)
        there = root.stat()
    except OSError as cause:
        raise _refused(cause, root) from cause
    if there.st_uid != os.geteuid() or there.st_mode & 0o022:
        raise ResourceError(f"others may write to {root}", fix=f"chmod go-w {root}", key="LLMKIT_CACHE")
    return root


@contextmanager
def _aside(root: Path, key: str) -> Iterator[Path]:
    """A folder of this process alone, gone when the block ends; its lock shows that its maker lives."""
    folder = root / f"{ASIDE}{key[:12]}-{os.getpid()}-{secrets.token_hex(4)}"
    with _writing(folder):
        handle = _locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _locked(folder: Path) -> int:
    """Makes a folder and locks it; a sweep that comes between the two takes it for a dead one's: then once more."""
    while True:
        folder.mkdir(mode=0o700)
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(handle, fcntl.LOCK_EX)
        if _is(folder, handle):
            return handle
        os.close(handle)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Names the cache where its disk refuses.

    Raises:
        ResourceError: it does.
    """
    try:
        yield
    except OSError as cause:
        raise _refused(cause, folder) from cause


def _refusing(cause: OSError, folder: Path) -> bool:
    """Whether it is this folder that refuses what a maker does, and not what the maker reads or starts."""
    if cause.filename is not None:
        return folder in Path(os.fsdecode(cause.filename)).parents
    return cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _turn(lock: Path) -> Iterator[Callable[[], None]]:
    """One process at a time; gives what shows that this one still moves."""
    with _writing(lock):
        opened = lock.open("a")
    with opened as file:
        mine, moved, since = False, -1, time.monotonic()
        while not mine:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = True
            except BlockingIOError:
                if (now := os.fstat(file.fileno()).st_mtime_ns) != moved:
                    moved, since = now, time.monotonic()
                elif time.monotonic() - since > PATIENCE:
                    LOG.info("who holds %s has not moved for %.0f s: the work is done here too", lock, PATIENCE)
                    break
                time.sleep(0.05)
            except OSError as cause:
                raise _refused(cause, lock) from cause
        if mine:
            os.utime(file.fileno())
        try:
            yield lambda: os.utime(file.fileno()) if mine else None
        finally:
            if mine:
                lock.unlink(missing_ok=True)  # who waits for it finds the entry; who comes anew has a lock of its own


@contextmanager
def _made(root: Path, key: str, make: Make, alive: Callable[[], None]) -> Iterator[None]:
    """Makes an entry, which no sweep takes away before the block ends."""
    with _aside(root, key) as folder:
        try:
            facts = make(folder, alive)
        except OSError as cause:
            if not _refusing(cause, folder):
                raise
            raise _refused(cause, folder) from cause
        with _writing(folder), ExitStack() as stack:
            files = {path.name: [path.stat().st_size, sha256(path)] for path in sorted(folder.iterdir())}
            said = {"key": key, "facts": facts, "files": files}
            manifest = stack.enter_context((folder / MANIFEST).open("w"))
            manifest.write(json.dumps(said | {"sha256": key_of(said)}))
            manifest.flush()
            fcntl.flock(manifest, fcntl.LOCK_SH)
            _placed(folder, root / key)
            held = stack.pop_all()
        with held:
            yield


def _placed(folder: Path, path: Path) -> None:
    try:
        folder.rename(path)
    except OSError as cause:  # another process was faster: what it made is the same
        if cause.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _found(path: Path, key: str, mend: bool) -> Held | None:
    """The entry, if it is there and whole; `mend`: what is damaged is taken away."""
    try:
        handle = os.open(path / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as cause:
        if mend and path.exists():
            _move(path)
        if cause.errno not in (errno.ENOENT, errno.ELOOP):
            raise _refused(cause, path) from cause
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        if not _is(path / MANIFEST, handle):  # a sweep was faster
            os.close(handle)
            return None
        said = json.loads(os.pread(handle, os.fstat(handle).st_size, 0))
        if why := _damage(path, key, said):
            raise ValueError(why)
        os.utime(handle)
        sizes = {name: size for name, (size, _) in said["files"].items()}
        return Held(path, said["facts"], sizes, handle)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as cause:
        os.close(handle)
        if mend:
            LOG.info("%s is damaged and is made again: %s", path, cause)
            _move(path)
        return None


def _damage(path: Path, key: str, said: dict[str, Any]) -> str:
    own = said.pop("sha256")
    if said["key"] != key or key_of(said) != own:
        return "its manifest is another one's"
    there = {file.name for file in path.iterdir()} - {MANIFEST}
    if there != set(said["files"]):
        return f"holds other files: {', '.join(sorted(there ^ set(said['files']))[:3])}"
    for name, (size, digest) in said["files"].items():
        file = path / name
        if file.is_symlink() or file.stat().st_size != size or sha256(file) != digest:
            return f"{name} is not what was written"
    return ""


def _refused(cause: OSError, path: Path) -> ResourceError:
    full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free some space, or set LLMKIT_CACHE to another disk" if full else "set LLMKIT_CACHE to a folder of yours"
    return ResourceError(f"writing {path} failed: {os.strerror(cause.errno or 0)}", fix=fix, key="LLMKIT_CACHE")
