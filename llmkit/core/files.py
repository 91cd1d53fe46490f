"""The calls that write: every file of a run goes through these few, so that a crash can be put between any two.

`Disk` is the seam: the real one calls the operating system; tests give one that stops, fails or forgets.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmkit.core.errors import ResourceError
from llmkit.core.scalars import UNITS

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EFBIG)
"""What only a disk says."""
FULL = "free some space, or set out to another disk"
FIXES = {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EFBIG: "raise the limit on the size of a file (ulimit -f)"}
"""What to do about some of it."""


class Disk:
    """The write-class calls of the operating system."""

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        """A new file of these parts, on the disk when this returns."""
        with path.open("wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())

    def overwrite(self, path: Path, data: bytes) -> None:
        """Other contents of a file that is there, in the room that it has."""
        with path.open("r+b", buffering=0) as file:
            written = 0
            while written < len(data):
                written += file.write(data[written:])
            file.truncate()
            os.fsync(file.fileno())

    def make(self, folder: Path) -> None:
        """A new folder."""
        folder.mkdir(parents=True)

    def rename(self, old: Path, new: Path) -> None:
        """An atomic change of name, over what is there."""
        old.replace(new)

    def sync(self, path: Path) -> None:
        """The entries of a folder, or the contents of a file, on the disk when this returns."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        """A file or a whole folder, gone."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


DISK = Disk()


def ensure(folder: Path, disk: Disk = DISK) -> None:
    """A folder with its missing parents, whose names too are on the disk when this returns.

    Raises:
        OSError: the disk refuses.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):  # another process makes it at this instant
            disk.make(path)
        disk.sync(path.parent)


def write_atomic(path: Path, data: bytes, disk: Disk = DISK) -> None:
    """`data` under `path`, whole or not at all.

    Raises:
        ResourceError: the disk refuses; what was there before stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        disk.write(aside, [data])
        disk.rename(aside, path)
        disk.sync(path.parent)
    except OSError as cause:
        _forget(aside)
        raise refused(cause, "writing", path) from cause


def write_json(path: Path, value: Mapping[str, Any], disk: Disk = DISK) -> None:
    """A JSON file, whole or not at all."""
    write_atomic(path, (as_json(value, indent=1) + "\n").encode(), disk)


def write_over(path: Path, value: Mapping[str, Any], disk: Disk = DISK) -> None:
    """A JSON file in the place of the one that is there: it needs no room for two, and a crash may leave half of it.

    Raises:
        ResourceError: the disk refuses.
    """
    try:
        disk.overwrite(path, (as_json(value, indent=1) + "\n").encode())
    except OSError as cause:
        raise refused(cause, "writing", path) from cause


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON, which has no NaN and no infinity: they are written as the text that `repr` gives them."""
    return json.dumps(_strict(value), indent=indent, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value


def publish(aside: Path, folder: Path, disk: Disk = DISK) -> None:
    """A folder written aside takes its name, over an older one of the same name."""
    old = _back(folder, disk)
    if old.exists():
        disk.remove(old)
    if folder.exists():
        disk.rename(folder, old)
    try:
        disk.rename(aside, folder)
    except OSError:
        with suppress(OSError):  # where it refuses this too, the next one puts it back
            _back(folder, disk)
        raise
    disk.sync(folder.parent)
    if old.exists():
        disk.remove(old)


@contextmanager
def published(folder: Path, disk: Disk = DISK) -> Iterator[Path]:
    """A folder to write into, which takes the name of `folder`, over an older one, when all is written: or never."""
    _back(folder, disk)
    for left in _left(folder):
        disk.remove(left)
    aside = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    disk.make(aside)
    try:
        yield aside
        publish(aside, folder, disk)
    except BaseException:
        _forget(aside)
        raise


def _back(folder: Path, disk: Disk) -> Path:
    """Where an older folder is while a new one takes its name; one whose process was killed in between comes back."""
    old = folder.with_name(f".old-{folder.name}")
    if old.exists() and not folder.exists():
        disk.rename(old, folder)
    return old


def _left(folder: Path) -> list[Path]:
    """What processes that are no more, or had this one's number, wrote aside for a folder."""
    name = re.compile(rf"\.tmp-{re.escape(folder.name)}-(\d+)")
    found = [(path, name.fullmatch(path.name)) for path in folder.parent.glob(".tmp-*")]
    return [path for path, its in found if its and (int(its[1]) == os.getpid() or not _lives(int(its[1])))]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def refused(cause: OSError, doing: str, path: Path, needed: int = 0) -> ResourceError:
    """The one line for a disk that refuses."""
    amount = f", which needs {amount_of(needed)}," if needed else ""
    fix = FIXES.get(cause.errno or 0, "give a folder that can be written")
    return ResourceError(f"{doing} {path}{amount} failed: {os.strerror(cause.errno or 0)}", fix=fix, key="out")


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turns what a disk refuses to a library that writes into the one line.

    Raises:
        ResourceError: the disk refuses.
    """
    try:
        yield
    except Exception as cause:
        said = re.search(r"\(os error (\d+)\)", str(cause))  # what libraries in Rust make of it
        number = cause.errno if isinstance(cause, OSError) else int(said[1]) if said else None
        if number not in REFUSALS:
            raise
        path = Path(getattr(cause, "filename", None) or folder)
        raise refused(OSError(number, ""), "writing", path) from cause


def amount_of(size: int) -> str:
    """A number of bytes in a unit of which there is at least one."""
    unit = next((unit for unit in ("MiB", "KiB") if size >= UNITS["bytes"][unit]), "B")
    return f"{size / UNITS['bytes'][unit]:.0f} {unit}"


def _forget(path: Path) -> None:
    try:
        DISK.remove(path)
    except OSError:
        return  # the disk that refused to write may refuse this too; the leftover is taken away by the next save


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
