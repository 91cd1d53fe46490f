"""Writing and reading safetensors files without a second copy of the weights, hashed on the way.

The format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, data offsets), then the data.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmkit.core.errors import ModelError
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


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the data."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write(path: Path, tensors: Mapping[str, Tensor], disk: Disk = DISK) -> str:
    """Writes a file and gives its sha256. Tensors that share memory are written apart.

    Raises:
        OSError: the disk refuses.
    """
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes | memoryview]:
        for part in _parts(tensors):
            digest.update(part)
            yield part

    disk.write(path, hashed())
    return digest.hexdigest()


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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


def read(path: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a file whose sha256 is `expected`.

    Raises:
        ModelError: the file is missing or is not that one.
    """
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except OSError as cause:
        raise ModelError(f"cannot be read ({cause.strerror})", fix="use another checkpoint", file=str(path)) from cause
    if hashlib.sha256(raw.data).hexdigest() != expected:
        raise ModelError("is damaged: its sha256 is not the manifest's", fix="use another checkpoint", file=str(path))
    length = int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    body = torch.from_numpy(raw)[8 + length :]
    return {
        name: _aligned(body[item["data_offsets"][0] : item["data_offsets"][1]], TYPES[item["dtype"]]).view(
            item["shape"]
        )
        for name, item in header.items()
    }


def _aligned(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as a type; a slice that does not start on the type's boundary is copied."""
    wide = torch.empty((), dtype=dtype).element_size()
    return (data if data.storage_offset() % wide == 0 else data.clone()).view(dtype)
