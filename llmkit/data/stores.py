"""Where files are: on this machine, or in a store that fsspec reaches; which of them a path stands for."""

from __future__ import annotations

import glob
import hashlib
import io
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmkit.core.errors import DataError, without_logins

BLOCK = 1 << 20


def in_store(path: str) -> bool:
    """Whether a path is a store's (`s3://bucket/rows.jsonl`) and no file's of this machine."""
    return re.match(r"[a-z][a-z0-9+.]*://", path) is not None


def listed(paths: str | Sequence[str]) -> list[str]:
    """The files of a path, a glob or a list of these; those of a glob in the order of their names.

    Raises:
        DataError: a glob matches no file.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        matched = _stored(path) if in_store(path) else _local(path)
        if not matched:
            raise DataError("matches no file", fix="mend its path in the recipe", file=path)
        found += matched
    return found


def found_here(paths: str | Sequence[str]) -> list[str]:
    """The files of this machine among those of `listed`, as far as there are any; of a folder, all that are in it."""
    given = [paths] if isinstance(paths, str) else paths
    names = [name for path in given if not in_store(path) for name in _local(path)]
    folders = {
        name: sorted(str(p) for p in Path(name).rglob("*") if p.is_file()) for name in names if Path(name).is_dir()
    }
    return [file for name in names for file in folders.get(name, [name])]


def _local(path: str) -> list[str]:
    path = str(Path(path).expanduser())
    if not glob.has_magic(path) or Path(path).exists():
        return [path]
    found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - the pattern may be absolute
    return [name for name in found if not Path(name).is_dir()]


def _stored(path: str) -> list[str]:
    if not glob.has_magic(path):
        return [path]
    with _told(path):
        store, pattern = _store(path)
        found = store.glob(pattern, detail=True)
        return [store.unstrip_protocol(name) for name in sorted(found) if found[name].get("type") != "directory"]


def opened(path: str) -> BinaryIO:
    """A file, at its beginning.

    Raises:
        DataError: it is no file, or cannot be read.
    """
    if in_store(path):
        with _told(path):
            store, name = _store(path)
            return io.BufferedReader(_Told(store.open(name, "rb"), path), BLOCK)
    with _told(path):
        # a pipe may never end, and what was read is read again for its sha256
        if not stat.S_ISREG(Path(path).stat().st_mode):
            folder = Path(path).is_dir()
            fix = f"give its files: {path.rstrip('/')}/*" if folder else "give the path of a file"
            raise DataError("is a folder" if folder else "is no plain file", fix=fix, file=path)
        return Path(path).open("rb")


def digest(path: str) -> str:
    """The sha256 of a file, which is read once more for it.

    Raises:
        DataError: it is no file, or cannot be read.
    """
    with opened(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def mark(path: str) -> str:
    """The size of a file and the sha256 of its first and last MiB.

    Raises:
        DataError: it is no file, or cannot be read.
    """
    with opened(path) as file, _told(path):
        size = file.seek(0, io.SEEK_END)
        read = hashlib.sha256()
        for at in (0, max(0, size - BLOCK)):
            file.seek(at)
            read.update(file.read(BLOCK))
        return f"{size}-{read.hexdigest()}"


def _store(path: str) -> tuple[Any, str]:
    """(the file system, the name in it)."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as missing:
        raise DataError(f"a store needs fsspec ({missing})", fix="pip install fsspec", file=path) from missing
    found: tuple[Any, str] = url_to_fs(path)
    return found


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Makes of what a file system or a store's library raises the error for that path."""
    try:
        yield
    except DataError:
        raise
    except ImportError as missing:
        named = re.search(r"[Ii]nstall (\S+)", str(missing))  # what fsspec says of a store of its own
        package = missing.name or (named[1] if named else "the package of that store")
        raise DataError(f"its store needs a package ({missing})", fix=f"pip install {package}", file=path) from missing
    except Exception as cause:  # each store's library has errors of its own
        raise unreadable(path, cause) from cause


def unreadable(path: str, cause: Exception) -> DataError:
    """The error for a file that the operating system or its store refuses."""
    said = cause.strerror if isinstance(cause, OSError) else None
    why = without_logins(said or (str(cause).splitlines() or [""])[0][:120] or type(cause).__name__)
    return DataError(f"cannot be read ({why})", fix="mend its path in the recipe", file=path)


class _Told(io.RawIOBase):
    """A file of a store, whose library's own exceptions are made into ours."""

    def __init__(self, file: Any, path: str) -> None:
        self.file, self.path = file, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        with _told(self.path):
            return int(self.file.tell())

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        with _told(self.path):
            return int(self.file.seek(place, whence))

    def readinto(self, buffer: Any) -> int:
        with _told(self.path):
            data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()
