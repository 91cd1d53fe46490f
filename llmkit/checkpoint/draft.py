"""A checkpoint while it is written: aside, by one rank or by many, and then renamed."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmkit.checkpoint import tensors as files
from llmkit.checkpoint.deal import Whole
from llmkit.checkpoint.manifest import NAME, STATE, pack, part
from llmkit.core.errors import ResourceError
from llmkit.core.files import DISK, FULL, Disk, amount_of, ensure, publish, refused


@dataclass(frozen=True)
class Draft:
    """`folder/step-N` by `world` ranks, which write into one folder beside it, `aside`."""

    folder: Path
    step: int
    tensors: Mapping[str, Whole]
    world: int = 1
    token: str = ""
    """Chance, the same on all ranks: a rank of an earlier run that is not dead yet writes elsewhere."""
    disk: Disk = DISK

    @property
    def final(self) -> Path:
        """Its name when it is whole."""
        return self.folder / f"step-{self.step}"

    @property
    def aside(self) -> Path:
        """Its name until then."""
        return self.folder / f".tmp-step-{self.step}-{self.token}"

    @property
    def size(self) -> int:
        """Bytes of all its tensors."""
        blocks = ((one.dtype, block.shape) for one in self.tensors.values() for block in one.blocks)
        return sum(files.size(*block) for block in blocks)

    def begin(self) -> None:
        """Makes the folder, where no other save's leftovers are: for the main rank, before any writes.

        Raises:
            ResourceError: there is no room, or the disk refuses.
        """
        with self._told():
            clean(self.folder, self.disk)
            ensure(self.folder, self.disk)
            free = shutil.disk_usage(self.folder).free
            if free < self.size:
                raise ResourceError(
                    f"a checkpoint needs {amount_of(self.size)} and {self.folder} has {amount_of(free)}",
                    fix=FULL,
                    key="out",
                )
            self.disk.make(self.aside)

    def write(self, rank: int, held: Mapping[str, Tensor]) -> str:
        """Writes the file of a rank, each of its blocks by the tensor's name; gives the file's sha256.

        Raises:
            ResourceError: the disk refuses; what was written of the file is gone.
        """
        path = self.aside / part(rank, self.world)
        notes = {"step": str(self.step), "rank": str(rank), "world": str(self.world)}
        with self._told():
            try:
                return files.write(path, held, self.disk, notes)
            except OSError:
                path.unlink(missing_ok=True)  # room for the word that it failed
                raise

    def note(self, rank: int, said: Mapping[str, Any]) -> None:
        """Leaves a word of a rank for the main one: that its file is whole, or why not.

        Raises:
            ResourceError: the disk refuses.
        """
        with self._told():
            self.disk.write(self.aside / f".part-{rank}", [json.dumps(said).encode()])
            self.disk.rename(self.aside / f".part-{rank}", self._note(rank))

    def noted(self, rank: int) -> Mapping[str, Any] | None:
        """The word of a rank, when it is there."""
        try:
            said = json.loads(self._note(rank).read_bytes())
        except FileNotFoundError:
            return None
        return said if isinstance(said, dict) else None

    def _note(self, rank: int) -> Path:
        return self.aside / f".done-{rank}"

    def written(self) -> int:
        """Bytes that lie there by now, of all ranks."""
        return sum(path.stat().st_size for path in self.aside.glob("*.safetensors"))

    def publish(self, digests: Mapping[str, str], state: bytes) -> Path:
        """When the files of all ranks are there: writes `state` and the manifest, and gives the folder its name.

        Raises:
            ResourceError: the disk refuses; older checkpoints are untouched.
        """
        with self._told():
            for rank in range(1, self.world):
                self.disk.remove(self._note(rank))
            self.disk.write(self.aside / STATE, [state])
            named = {**digests, STATE: hashlib.sha256(state).hexdigest()}
            self.disk.write(self.aside / NAME, [pack(self.step, self.world, named, self.tensors)])
            self.disk.sync(self.aside)
            publish(self.aside, self.final, self.disk)
        return self.final

    def drop(self) -> None:
        """Takes away what was written; what the disk does not let go, the next save takes."""
        shutil.rmtree(self.aside, ignore_errors=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            raise refused(cause, "saving", self.final, self.size) from cause


def token() -> str:
    """For a draft."""
    return secrets.token_hex(4)


def clean(folder: Path, disk: Disk = DISK) -> None:
    """Takes away what a save that died left behind; an older checkpoint moved aside by it comes back."""
    for left in folder.glob(".old-step-*"):
        name = folder / left.name.removeprefix(".old-")
        if name.exists():
            disk.remove(left)
        else:
            disk.rename(left, name)
    for left in folder.glob(".tmp-*"):
        disk.remove(left)
