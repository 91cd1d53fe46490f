"""The tensors of a checkpoint, read when they are asked for: whole, or a block of one."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkit.checkpoint import tensors as files
from llmkit.checkpoint.deal import Block
from llmkit.checkpoint.manifest import Manifest
from llmkit.core.errors import ModelError

OPEN = 32
"""Files that are held open at once."""
WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> a type of that width that numpy has too."""


class Held(Mapping[str, Tensor]):
    """Name -> whole tensor, put together from its slices each time it is asked for and kept nowhere: whoever goes
    through the names holds one tensor at a time. The files are mapped, so that `part` reads the bytes of its block
    alone (and the pages that they lie on)."""

    def __init__(self, path: Path, manifest: Manifest, names: tuple[str, ...] | None = None) -> None:
        self.path, self.manifest = path, manifest
        self.names = {name: manifest.tensors[name] for name in (manifest.tensors if names is None else names)}
        self._open: dict[int, tuple[mmap.mmap, dict[str, files.Entry]]] = {}

    def __getitem__(self, name: str) -> Tensor:
        shape = self.names[name].shape
        return self.part(name, (0,) * len(shape), shape)

    def __contains__(self, name: object) -> bool:
        return name in self.names  # a Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def without(self, prefix: str) -> Held:
        """The same but for names that begin with `prefix`."""
        return Held(self.path, self.manifest, tuple(name for name in self.names if not name.startswith(prefix)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor; nothing of it is read."""
        return self.names[name].shape

    def part(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The block of a tensor that begins at `start`, in memory of its own.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the block is not within it.
            ModelError: a file cannot be read any more.
        """
        one = self.names[name]
        ends = [a + n for a, n in zip(start, shape, strict=True)]
        if len(shape) != len(one.shape) or min((0, *start, *shape)) < 0 or any(map(int.__gt__, ends, one.shape)):
            raise ValueError(f"{name} of shape {one.shape} has no block of {shape} at {start}")
        made = torch.empty(shape, dtype=files.TYPES[self._dtype(name)])
        out = made.view(WIDE[made.element_size()]).numpy()
        for block in one.blocks:
            self._fill(name, block, start, out)
        return made

    def _dtype(self, name: str) -> str:
        """Of a tensor: format 1 says it in the file alone."""
        return self.names[name].dtype or self._file(0)[1][name].dtype

    def _fill(self, name: str, block: Block, start: tuple[int, ...], out: np.ndarray[Any, Any]) -> None:
        """Copies what a block has of the rectangle of `out` that begins at `start`."""
        low = [max(a, b) for a, b in zip(block.start, start, strict=True)]
        high = [min(a + m, b + n) for a, m, b, n in zip(block.start, block.shape, start, out.shape, strict=True)]
        if any(map(int.__ge__, low, high)):
            return
        mapped, entries = self._file(block.rank)
        view: np.ndarray[Any, Any] = np.ndarray(block.shape, out.dtype, mapped, entries[name].begin)
        there = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, block.start, strict=True))
        here = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        out[here] = view[there]

    def _file(self, rank: int) -> tuple[mmap.mmap, dict[str, files.Entry]]:
        """A file, mapped; the one that was opened first is closed for one too many."""
        if rank in self._open:
            return self._open[rank]
        path = self.path / self.manifest.parts[rank]
        try:
            entries = files.header(path)[1]
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, TypeError, LookupError) as cause:
            raise ModelError(f"cannot be read any more ({cause!r:.120})", fix="run again", file=str(path)) from cause
        if len(self._open) >= OPEN:
            del self._open[next(iter(self._open))]
        self._open[rank] = (mapped, entries)
        return self._open[rank]
