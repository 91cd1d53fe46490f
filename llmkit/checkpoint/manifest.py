"""What a checkpoint says of itself: `manifest.json`, which carries its own sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.checkpoint.deal import Block, Whole, tiles
from llmkit.checkpoint.tensors import TYPES

FORMAT = 2
FIRST = "tensors.safetensors"
"""The one file of tensors of format 1, which is still read."""
STATE = "state.json"
NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """One checkpoint: `files` by name with the sha256 of each, `parts` the file of each rank that wrote it."""

    step: int
    files: Mapping[str, str]
    parts: tuple[str, ...]
    tensors: Mapping[str, Whole]

    @property
    def format(self) -> int:
        """Of the files."""
        return 1 if self.parts == (FIRST,) else FORMAT


def part(rank: int, world: int) -> str:
    """The file of a rank."""
    return f"tensors-{rank}-of-{world}.safetensors"


def pack(step: int, world: int, files: Mapping[str, str], tensors: Mapping[str, Whole]) -> bytes:
    """The bytes of a manifest."""
    held = {
        name: {
            "dtype": one.dtype,
            "shape": one.shape,
            "slices": [[block.rank, block.start, block.shape] for block in one.blocks],
        }
        for name, one in tensors.items()
    }
    return seal({"format": FORMAT, "step": step, "world": world, "files": dict(files), "tensors": held})


def seal(said: Mapping[str, Any]) -> bytes:
    """A manifest with its own sha256."""
    plain = {key: value for key, value in said.items() if key != "sha256"}
    return (json.dumps({**plain, "sha256": _digest(plain)}) + "\n").encode()


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def unpack(said: Mapping[str, Any]) -> Manifest | None:
    """What a manifest says, or None where it is of no format that is known.

    Raises:
        ValueError, TypeError, LookupError: it is damaged, or says what no save of ours says.
    """
    if said.get("format") == 1 and set(said.get("files", {})) == {FIRST, STATE}:
        held = {name: _first(one) for name, one in said["tensors"].items()}
        if (said["rank"], said["world"]) != (0, 1):
            raise ValueError("it tells of other ranks")
        return Manifest(said["step"], said["files"], (FIRST,), held)
    if said.get("format") != FORMAT:
        return None
    if said["sha256"] != _digest({key: value for key, value in said.items() if key != "sha256"}):
        raise ValueError("its sha256 is not its own")
    if said["world"] != len(said["files"]) - 1:  # before so many names are made
        raise ValueError(f"it tells of {said['world']} ranks and names {len(said['files'])} files")
    parts = tuple(part(rank, said["world"]) for rank in range(said["world"]))
    if set(said["files"]) != {*parts, STATE}:
        raise ValueError(f"it names {sorted(said['files'])}")
    held = {name: _whole(name, one, len(parts)) for name, one in said["tensors"].items()}
    return Manifest(said["step"], said["files"], parts, held)


def _first(one: Mapping[str, Any]) -> Whole:
    """A tensor of format 1, which does not say its type: the file does."""
    shape = tuple(one["shape"])
    if one["slice"] != [[0, length] for length in shape]:
        raise ValueError("it tells of slices")
    return Whole("", shape, (Block(0, (0,) * len(shape), shape),))


def _whole(name: str, one: Mapping[str, Any], world: int) -> Whole:
    blocks = tuple(Block(rank, tuple(start), tuple(shape)) for rank, start, shape in one["slices"])
    found = Whole(one["dtype"], tuple(one["shape"]), blocks)
    numbers = [*found.shape, *(n for block in blocks for n in (*block.start, *block.shape, block.rank))]
    sound = found.dtype in TYPES and all(type(n) is int and n >= 0 for n in numbers)
    if not sound or any(block.rank >= world for block in blocks):
        raise ValueError(f"{name} is {one!s:.80}")
    covered = tiles([(block.start, block.shape) for block in blocks], ((0,) * len(found.shape), found.shape))
    if not covered and (blocks or 0 not in found.shape):
        raise ValueError(f"the slices of {name} do not make up its shape")
    return found
