"""Writing and reading safetensors files without a second copy of the weights, hashed on the way.

The format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, data offsets), then the data.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmkit.core.files import DISK, Disk

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in DTYPES.items()}
PIECE = 1 << 24
NOTES = "__metadata__"
MOST = 1 << 28
"""Bytes of a header."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: `begin` is the byte of the file where its data begins."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


def size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data."""
    return math.prod(shape) * TYPES[dtype].itemsize


def write(path: Path, tensors: Mapping[str, Tensor], disk: Disk = DISK, notes: Mapping[str, str] | None = None) -> str:
    """Writes a file and gives its sha256; `notes` go into its header. Tensors that share memory are written apart.

    Raises:
        OSError: the disk refuses.
    """
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes | memoryview]:
        for part in _parts(tensors, notes or {}):
            digest.update(part)
            yield part

    disk.write(path, hashed())
    return digest.hexdigest()


def _parts(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {NOTES: {"format": "pt", **notes}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        for piece in flat.split(PIECE):
            yield memoryview(piece.numpy())


def header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """(notes, entries) of a file, whose data must lie end to end and end where it ends.

    Raises:
        OSError: it cannot be read.
        ValueError, TypeError, LookupError: it is no file of ours.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST, path.stat().st_size - 8):
            raise ValueError(f"a header of {length} bytes")
        said = json.loads(file.read(length))
    notes = {str(key): str(value) for key, value in said.pop(NOTES, {}).items()}
    found: dict[str, Entry] = {}
    at = 8 + length
    for name, item in sorted(said.items(), key=lambda pair: (pair[1]["data_offsets"][0], pair[1]["data_offsets"][1])):
        shape = tuple(item["shape"])
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{name} of shape {item['shape']}")
        end = at + size(item["dtype"], shape)
        if [at - 8 - length, end - 8 - length] != item["data_offsets"]:
            raise ValueError(f"{name} at {item['data_offsets']}")
        found[name] = Entry(item["dtype"], shape, at)
        at = end
    if at != path.stat().st_size:
        raise ValueError(f"{path.stat().st_size - at} bytes behind the data")
    return notes, found
