"""Adapters by the names that requests give them: loaded, replaced and unloaded while the engine runs. No tensors.

Every load makes a new version, under a key of its own. A request holds the version that it began with, and one that
nobody holds any longer goes when it was replaced, unloaded, or is the longest unused of more than may be kept.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.core.errors import ModelError
from llmkit.core.packed import packed_file
from llmkit.inference.request import Busy, RequestError

if TYPE_CHECKING:
    from torch import Tensor

MOST = 16
"""Adapters that lie ready at once."""
LONGEST = 128
"""Characters of a name."""


def check_folders(named: Mapping[str, str | Path]) -> None:
    """Looks whether adapters are there at all, which takes no model.

    Raises:
        ModelError: one has no folder.
    """
    for name, folder in named.items():
        if not Path(folder).expanduser().is_dir():
            fix, form = "give the folder of an adapter", packed_file(Path(folder).expanduser())
            is_not = f"is a {form} archive, and none is unpacked here" if form else "is no folder that there is"
            raise ModelError(f"{folder} {is_not}", fix=fix, key=f"adapters.{name}")


class Read(Protocol):
    """An adapter with its tensors."""

    @property
    def virtual(self) -> int:
        """Virtual tokens that stand before a prompt."""
        ...

    @property
    def mark(self) -> str:
        """The digest of its weights."""
        ...


class Bank(Protocol):
    """Where the tensors of adapters lie, by key."""

    def read(self, folder: Path) -> Read:
        """An adapter of a folder, checked against the base.

        Raises:
            ModelError: it does not fit, or is nothing that can be run beside others.
        """
        ...

    def made(self, like: str, tensors: Mapping[str, Tensor]) -> Read:
        """The adapter `like` with other weights, by the names that peft saves them under.

        Raises:
            ModelError: they do not fit.
        """
        ...

    def put(self, key: str, adapter: Any) -> None:
        """Keeps what was read or made."""
        ...

    def leave(self, adapter: Any) -> None:
        """What was read or made is not to be kept after all."""
        ...

    def drop(self, key: str) -> None:
        """Nobody needs it any longer."""
        ...


@dataclass(eq=False)
class Version:
    """One version of an adapter."""

    key: str
    """NAME@NUMBER; that of the base is empty."""
    before: int = 0
    """Virtual tokens that stand before a prompt."""
    mark: str = ""
    """The digest of its weights."""
    folder: Path | None = None
    """Where it was read; there it can be read again. None of what was handed over."""
    holders: int = 0
    here: bool = True
    """Whether its tensors lie ready."""


class Adapters:
    """The adapters of an engine. Loading may go on in another thread than the engine's steps."""

    def __init__(self, bank: Bank | None = None, root: Path | None = None, most: int = MOST) -> None:
        """`root`: the folder under which adapters are loaded by path; without it none are."""
        self.bank, self.root, self.most = bank, root, most
        self.named: OrderedDict[str, Version] = OrderedDict()
        """The longest unused first."""
        self.old: dict[str, Version] = {}
        """By key: versions that were replaced or unloaded, and are held still."""
        self.whole = Version("")
        """What requests get that name none."""
        self.count, self.lock = 0, threading.RLock()

    @property
    def names(self) -> list[str]:
        """Of those that requests may ask for."""
        with self.lock:
            return sorted(self.named)

    def load(self, name: str, path: str) -> None:
        """Reads the adapter in the folder `path` under the root, and serves it as `name` from now on; where it cannot
        be read, the one that was there goes on.

        Raises:
            RequestError: the name or the path is refused.
            ModelError: the adapter does not fit.
        """
        self._check_name(name)
        self._add(name, inside(self.root, path))

    def add(self, name: str, folder: Path) -> None:
        """The same for a folder that whoever started the engine named, wherever it lies."""
        self._check_name(name)
        self._add(name, folder.resolve())

    def be(self, folder: Path) -> None:
        """The model itself is this adapter on its base: requests that name none get it."""
        self._commit("", self._bank().read(folder), folder.resolve())

    def replace(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Other weights for an adapter, by the names that peft saves them under: a new version, for requests that come
        from now on.

        Raises:
            RequestError: there is no such adapter.
            ModelError: the tensors do not fit it.
        """
        with self.lock:
            like = self._current(name)
            if not like.key:
                raise RequestError("the model itself is no adapter", fix="name one that is loaded", key="lora_name")
            self._load_again(name, like)
        self._commit(name, self._bank().made(like.key, tensors), None)

    def unload(self, name: str) -> None:
        """No request gets it from now on; those that run end on it.

        Raises:
            RequestError: there is no such adapter.
        """
        with self.lock:
            if not name:  # what requests get that name none is no adapter of its own
                raise RequestError("no adapter is named ''", fix="name one that is loaded", key="lora_name")
            self._retire(self._current(name))
            del self.named[name]

    def hold(self, name: str) -> Version:
        """The version that a request of now begins and ends with.

        Raises:
            RequestError: there is no such adapter.
            Busy: as many as may lie ready are in use.
        """
        with self.lock:
            one = self._current(name)
            self._load_again(name, one)
            one.holders += 1
            return one

    def away(self, name: str) -> bool:
        """Whether `hold` would read an adapter first, one that made room for others."""
        with self.lock:
            one = self.named.get(name)
            return one is not None and not one.here and one.folder is not None

    def prepare(self, name: str) -> None:
        """Reads it before, in a thread whose files the steps need not wait for.

        Raises:
            RequestError: as `hold`.
        """
        with self.lock:
            one = self._current(name)
            if one.here or one.folder is None:
                return
            self._make_room()
        found = self._read_again(name, one, one.folder)
        with self.lock:
            if one.here or self.named.get(name) is not one:  # another was quicker, or it was replaced meanwhile
                self._bank().leave(found)
                return
            try:
                self._make_room()
            except Busy:
                self._bank().leave(found)
                raise
            self._bank().put(one.key, found)
            one.here = True

    def release(self, one: Version) -> None:
        """A request that held it has ended."""
        with self.lock:
            one.holders -= 1
            if not one.holders and self.old.pop(one.key, None) is not None:
                self._bank().drop(one.key)

    def _current(self, name: str) -> Version:
        if not name:
            return self.whole
        if name not in self.named:
            fix = "load it first"
            if self.root is None:  # none comes later, and those of the start are everybody's: they may be told
                names = ", ".join(sorted(self.named))
                fix = f"name one of {names}" if names else "name the adapters as the model is opened"
            raise RequestError(f"no adapter is named {name[:LONGEST]!r}", fix=fix, key="model")
        self.named.move_to_end(name)
        return self.named[name]

    def _add(self, name: str, folder: Path) -> None:
        self._commit(name, self._bank().read(folder), folder)

    def _commit(self, name: str, adapter: Read, folder: Path | None) -> None:
        with self.lock:
            before = self.named.get(name) if name else self.whole
            if before is None or not before.here:
                try:
                    self._make_room()
                except Busy:
                    self._bank().leave(adapter)
                    raise
            self.count += 1
            one = Version(f"{name}@{self.count}", adapter.virtual, adapter.mark, folder)
            self._bank().put(one.key, adapter)
            if before is not None and before.key:
                self._retire(before)
            if name:
                self.named[name] = one
                self.named.move_to_end(name)
            else:
                self.whole = one

    def _load_again(self, name: str, one: Version) -> None:
        """One that made room for others comes back."""
        if one.here or one.folder is None:
            return
        self._make_room()
        self._bank().put(one.key, self._read_again(name, one, one.folder))
        one.here = True

    def _read_again(self, name: str, one: Version, folder: Path) -> Read:
        """From the folder that it came from, if it is the same still."""
        try:
            found = self._bank().read(folder)
        except ModelError as cause:
            raise RequestError(f"{name} cannot be read again", fix="load it anew", key="model") from cause
        if found.mark != one.mark:
            self._bank().leave(found)
            raise RequestError(f"{name} is not what it was when it was loaded", fix="load it anew", key="model")
        return found

    def _make_room(self) -> None:
        """The longest unused that can be read again goes, if there are as many as may be."""
        ready = [one for one in self.named.values() if one.here]
        if len(ready) < self.most:
            return
        free = next((one for one in ready if not one.holders and one.folder is not None), None)
        if free is None:
            what = f"all {self.most} adapters that may lie ready are in use"
            raise Busy(what, fix="try again later, or allow more", key="model")
        self._bank().drop(free.key)
        free.here = False

    def _retire(self, one: Version) -> None:
        if one.holders:
            self.old[one.key] = one
        elif one.here:
            self._bank().drop(one.key)

    def _bank(self) -> Bank:
        if self.bank is None:
            raise RequestError("this model takes no adapters", fix="serve its base", key="model")
        return self.bank

    def _check_name(self, name: str) -> None:
        if not name or len(name) > LONGEST or not name.isprintable():
            what = f"{name[:LONGEST]!r} is no name for an adapter"
            raise RequestError(what, fix=f"give 1 to {LONGEST} printable characters", key="lora_name")


def inside(root: Path | None, path: str, key: str = "lora_path") -> Path:
    """The folder that `path` names under `root`, every link followed; `key` is the field that names it.

    Raises:
        RequestError: there is none, or it is elsewhere.
    """
    if root is None:
        raise RequestError("adapters are not loaded by path here", fix="serve with a root for them", key=key)
    fix, root = "name a folder under the root of adapters", Path(os.path.realpath(root))
    try:
        plain = bool(path) and path.isprintable() and "://" not in path and not Path(path).is_absolute()
        found = Path(os.path.realpath(root / path)) if plain else root
        if not plain or found == root or not found.is_relative_to(root):
            raise RequestError(f"{path[:200]!r} does not lie under the root of adapters", fix=fix, key=key)
        if not found.is_dir():
            raise RequestError(f"{path[:200]!r} is no folder", fix=fix, key=key)
    except (OSError, ValueError) as cause:  # a name that no file can have
        raise RequestError(f"{path[:200]!r} cannot be looked up", fix=fix, key=key) from cause
    return found
