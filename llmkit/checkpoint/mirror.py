"""Copies of checkpoints in a store that fsspec reaches: `URL/NAME/step-N/`, where NAME is that of the run's folder.

A store has no rename: the manifest goes last and comes away first, and a folder without one is no checkpoint. What is
written is read back and hashed before its manifest is.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmkit.checkpoint.manifest import NAME, STATE, unpack
from llmkit.checkpoint.tensors import PIECE
from llmkit.core.errors import LlmkitError, ModelError, ResourceError, without_logins
from llmkit.core.files import DISK, Disk, ensure, refused
from llmkit.core.folder import steps

GRACE = 5.0
"""Seconds that a run which was asked to stop waits for its copy."""
SIGN = 1.0
"""Seconds between two signs that copies get on."""
KEY = "checkpoint.mirror"


class Mirror:
    """Keeps the store as the folder of checkpoints is, in a thread of its own: the newest that is missing there first;
    what the folder does not have any more goes from the store when nothing is missing. A fault is told, and what is
    missing is tried again with the next checkpoint."""

    def __init__(self, url: str, folder: Path, say: Callable[[str], None]) -> None:
        self.url, self.folder, self.say = url, folder, say
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.wanted, self.ending, self.busy = False, threading.Event(), set[int]()
        self.pieces = 0
        """How many were read or written."""

    def send(self, step: int) -> None:
        """There is a new checkpoint."""
        with self.lock:
            self.wanted = True
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, name="llmkit-mirror", daemon=True)
                self.thread.start()

    @contextmanager
    def still(self) -> Iterator[set[int]]:
        """Inside, no other checkpoint is begun to be copied than those that it gives."""
        with self.lock:
            yield set(self.busy)

    def end(self, in_time: bool, sign: Callable[[], None] = lambda: None) -> None:
        """Waits for the copies; where the run was asked to stop (`in_time`), for `GRACE` seconds at most. Says so by
        `sign` as long as they get on."""
        thread, seen = self.thread, -1
        if thread is None:
            return
        thread.join(GRACE if in_time else SIGN)
        while thread.is_alive() and not in_time:
            if self.pieces != seen:
                seen = self.pieces
                sign()
            thread.join(SIGN)
        self.ending.set()
        if thread.is_alive():
            self.say(f"{KEY}: not all checkpoints are copied; the next run does it")

    def _more(self) -> bool:
        with self.lock:
            more, self.wanted = self.wanted, False
            if not more:
                self.thread = None
        return more

    def _work(self) -> None:
        while self._more():
            try:
                with _told(self.url):
                    self._sync()
            except LlmkitError as cause:
                self.say(without_logins(f"{KEY}: {cause}; the run goes on, and tries again with the next checkpoint"))

    def _sync(self) -> None:
        store, root = opened(self.url, self.folder)
        tried: set[int] = set()
        while (step := self._missing(store, root, tried)) is not None:
            tried.add(step)
            with self.lock:
                self.busy = {step} if (self.folder / f"step-{step}").is_dir() else set()
            try:
                if self.busy:
                    self._copy(store, self.folder / f"step-{step}", f"{root}/step-{step}")
            finally:
                with self.lock:
                    self.busy = set()
        here = set(steps(self.folder))
        for step in set(_there(store, root)) - here:
            _remove(store, f"{root}/step-{step}")

    def _missing(self, store: Any, root: str, tried: set[int]) -> int | None:
        """The newest step whose manifest is not in the store as it is here."""
        for step in steps(self.folder):
            with suppress(FileNotFoundError):  # it was pruned at this instant
                if step not in tried and (self.folder / f"step-{step}" / NAME).read_bytes() != _manifest(
                    store, f"{root}/step-{step}"
                ):
                    return step
        return None

    def _copy(self, store: Any, source: Path, target: str) -> None:
        raw = (source / NAME).read_bytes()
        _remove(store, target)
        store.makedirs(target, exist_ok=True)
        for name, digest in json.loads(raw)["files"].items():
            with (source / name).open("rb") as here, store.open(f"{target}/{name}", "wb") as there:
                for piece in self._pieces(here):
                    there.write(piece)
            with store.open(f"{target}/{name}", "rb") as there:
                found = hashlib.sha256()
                for piece in self._pieces(there):
                    found.update(piece)
            if found.hexdigest() != digest:
                raise ResourceError(f"what lies at {target}/{name} is not what was written", fix="check the store")
        store.pipe_file(f"{target}/{NAME}", raw)

    def _pieces(self, file: Any) -> Iterator[bytes]:
        while piece := file.read(PIECE):
            if self.ending.is_set():
                raise ResourceError("the run ended before all was copied", fix="run it again")
            self.pieces += 1
            yield piece


def opened(url: str, folder: Path) -> tuple[Any, str]:
    """(the file system, the place of a run's checkpoints in it).

    Raises:
        ResourceError: a package is missing, or nothing is known of such addresses.
    """
    try:
        from fsspec.core import url_to_fs

        store, root = url_to_fs(url)
    except ImportError as missing:
        raise ResourceError(
            f"it needs a package ({missing})", fix="pip install 'llmkit[remote]', or the store's own", key=KEY
        ) from missing
    except ValueError as cause:
        raise ResourceError(
            f"{url} is no place that fsspec knows ({cause})", fix="write s3://BUCKET/PLACE, or a folder", key=KEY
        ) from cause
    return store, f"{root.rstrip('/')}/{folder.absolute().parent.name}"


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Raises:
    ResourceError: the store refuses; each store's library has errors of its own.
    """
    try:
        yield
    except LlmkitError:
        raise
    except Exception as cause:
        why = (str(cause).splitlines() or [""])[0][:160] or type(cause).__name__
        raise ResourceError(f"{url} refuses ({why})", fix="check the store", key=KEY) from cause


def _manifest(store: Any, place: str) -> bytes | None:
    try:
        return bytes(store.cat_file(f"{place}/{NAME}"))
    except FileNotFoundError:
        return None


def _there(store: Any, root: str) -> list[int]:
    """The steps that have a folder in the store, newest first."""
    store.invalidate_cache()
    try:
        names = [str(path).rstrip("/").rpartition("/")[2] for path in store.ls(root, detail=False)]
    except FileNotFoundError:
        return []
    return sorted((int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name)), reverse=True)


def _remove(store: Any, place: str) -> None:
    """The manifest first: what is left of it is no checkpoint."""
    for path in (f"{place}/{NAME}", place):
        with suppress(FileNotFoundError):
            store.rm(path, recursive=path == place)


def occupied(url: str, folder: Path) -> bool:
    """Whether the store has checkpoints of a run by this name.

    Raises:
        ResourceError: the store cannot be read.
    """
    with _told(url):
        return bool(_there(*opened(url, folder)))


def fetch(url: str, folder: Path, say: Callable[[str], None], best: Callable[[Any], int | None]) -> None:
    """Brings the newest whole checkpoint of a store into `folder`, and the one that its facts name as the `best`. What
    is damaged there is told and passed over.

    Raises:
        ResourceError: the store cannot be read, or the disk refuses.
    """
    with _told(url):
        store, root = opened(url, folder)
        for step in _there(store, root):
            if _manifest(store, f"{root}/step-{step}") is None or not _fetched(store, root, folder, step, say):
                continue
            facts = json.loads((folder / f"step-{step}" / STATE).read_bytes())
            also = best(facts)
            if also not in (None, step) and also in _there(store, root):
                _fetched(store, root, folder, also, say)
            return


def _fetched(store: Any, root: str, folder: Path, step: int, say: Callable[[str], None]) -> bool:
    """Whether a checkpoint was brought here whole."""
    say(f"bringing step-{step} from {without_logins(str(root))}")
    try:
        _bring(store, f"{root}/step-{step}", folder, step)
    except ModelError as cause:
        say(f"passing over a checkpoint: {cause.problems[0]}")
        return False
    return True


def _bring(store: Any, place: str, folder: Path, step: int, disk: Disk = DISK) -> None:
    aside, raw = folder / f".tmp-mirror-{step}", _manifest(store, place) or b""
    try:
        manifest = unpack(json.loads(raw))
    except (AttributeError, LookupError, TypeError, ValueError) as cause:
        raise ModelError(f"is damaged ({cause!r:.120})", fix="remove it there", file=f"{place}/{NAME}") from cause
    if manifest is None:
        raise ModelError("is no checkpoint of this version", fix="remove it there", file=f"{place}/{NAME}")
    try:
        ensure(folder, disk)
        disk.remove(aside)
        disk.make(aside)
        for name, digest in manifest.files.items():
            found = hashlib.sha256()
            with store.open(f"{place}/{name}", "rb") as there:
                disk.write(aside / name, _hashed(there, found))
            if found.hexdigest() != digest:
                raise ModelError(
                    "is damaged: its sha256 is not the manifest's", fix="remove it", file=f"{place}/{name}"
                )
        disk.write(aside / NAME, [raw])
        disk.sync(aside)
        disk.rename(aside, folder / f"step-{step}")
        disk.sync(folder)
    except FileNotFoundError as cause:
        raise ModelError(f"lacks a file ({cause})", fix="remove it there", file=place) from cause
    except OSError as cause:
        raise refused(cause, "copying to", folder / f"step-{step}") from cause
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _hashed(file: Any, found: Any) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        found.update(piece)
        yield piece
