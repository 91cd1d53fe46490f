"""Looking at a model's folder before anything in it is loaded: names, headers, sizes. No code, no pickle, no escape.

The safetensors format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.core.errors import ModelError
from llmkit.core.files import sha256
from llmkit.core.packed import packed_file

MOST_HEADER = 100_000_000
MOST_JSON = 1 << 26
WIDTH = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
WIDTH |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

FETCH = "fetch the model again"
NUMBERED = re.compile(r"\.\d+(?=\.)")
"""A number in a weight's name: of its layer, and of its expert."""

Header = dict[str, dict[str, Any]]


def check_folder(folder: Path, stem: str = "model") -> dict[str, Header]:
    """The headers of a folder's weight files, by file name, all of them sound.

    Raises:
        ModelError: there is none, or one is not what it says.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists() or single.is_symlink():
        names = [single.name]
        mapping: Mapping[str, str] = {}
    elif index.exists():
        mapping = _weight_map(index)
        names = sorted(set(mapping.values()))
    else:
        raise _no_weights(folder, stem)
    headers = {name: read_header(_inside(folder, name, index)) for name in names}
    for tensor, name in mapping.items():
        if tensor not in headers[name]:
            raise ModelError(
                f"{tensor} is not in {name}", fix="fetch the model again", file=str(index), key="weight_map"
            )
    return headers


def digest(folder: Path, stem: str = "model") -> str:
    """The identity of a folder's weights, all of which are read."""
    return identity({name: sha256(folder / name) for name in check_folder(folder, stem)})


def identity(digests: Mapping[str, str]) -> str:
    """The identity of weights, from the sha256 of each of their files: the same wherever they lie."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _no_weights(folder: Path, stem: str) -> ModelError:
    pickled = next((path.name for pattern in PICKLES for path in folder.glob(pattern)), "")
    if pickled:
        return ModelError(
            f"{folder} holds pickled weights ({pickled}), which can run code", fix="convert to safetensors", key="model"
        )
    archive = next(((path.name, form) for path in sorted(folder.iterdir()) if (form := packed_file(path))), None)
    if archive is not None:
        what = f"{folder} holds no {stem}.safetensors, and {archive[0]}, a {archive[1]} archive, is not unpacked"
        return ModelError(what, fix="unpack it elsewhere and look at what it holds", key="model")
    return ModelError(
        f"{folder} holds no {stem}.safetensors", fix="give a folder with safetensors weights", key="model"
    )


def _weight_map(index: Path) -> dict[str, str]:
    said = read_json(index)
    mapping = said.get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise ModelError("has no weight_map of names", fix="fetch the model again", file=str(index))
    return mapping


def _inside(folder: Path, name: str, index: Path) -> Path:
    """A weight file that really is a plain file of this folder (or of the snapshot store that its link leads to)."""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise ModelError(f"{name!r} is no plain file name", fix=FETCH, file=str(index), key="weight_map")
    return inside(folder, name, index, "weight_map")


def inside(folder: Path, name: str, said: Path | None = None, key: str = "") -> Path:
    """A file that really is a plain file of this folder (or of the snapshot store that its link leads to); `said`, with
    `key`, is the file that names it.

    Raises:
        ModelError: it is missing, elsewhere, or no plain file.
    """
    path = folder / name

    def refused(what: str) -> ModelError:
        return ModelError(what, file=str(said or path), key=key, fix=FETCH)

    real, root = path.resolve(), folder.resolve()
    hub = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    if not (real.is_relative_to(root) or real.is_relative_to(hub)):
        raise refused(f"{name!r} leads out of the folder")
    try:
        mode = real.stat().st_mode
    except OSError as cause:
        raise ModelError(f"{name} is missing", fix=FETCH, file=str(path)) from cause
    if not stat.S_ISREG(mode):
        raise refused(f"{name} is no plain file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size.

    Raises:
        ModelError: it is something else.
    """
    try:
        there = path.stat()
        if not stat.S_ISREG(there.st_mode):  # a pipe would be waited for, a device read without end
            raise ModelError("is no plain file", fix="fetch the model again", file=str(path))
        if there.st_size > MOST_JSON:
            raise ModelError(f"is larger than {MOST_JSON >> 20} MiB", fix="check where it comes from", file=str(path))
        said = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        why = cause.strerror if isinstance(cause, OSError) else "it is not JSON"
        raise ModelError(f"cannot be read: {why}", fix="fetch the model again", file=str(path)) from cause
    if not isinstance(said, dict):
        raise ModelError("holds no JSON object", fix="fetch the model again", file=str(path))
    return said


def read_header(path: Path) -> Header:
    """The header of a safetensors file whose tensors fill its data exactly.

    Raises:
        ModelError: naming the tensor and the offset that are wrong.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little") if len(first) == 8 else -1
        if not 0 < length <= min(MOST_HEADER, size - 8):
            raise _unsound(path, f"says its header has {length} bytes, the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=lambda pairs: _no_twins(pairs, path))
    except (ValueError, RecursionError) as cause:
        raise _unsound(path, "has a header that is not JSON") from cause
    if not isinstance(header, dict):
        raise _unsound(path, "has a header that is no JSON object")
    header.pop("__metadata__", None)
    _check_data(path, header, size - 8 - length)
    return header


def _no_twins(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise _unsound(path, f"names {next(name for name in names if names.count(name) > 1)} twice")
    return made


def _check_data(path: Path, header: Header, size: int) -> None:
    spans = []
    for name, item in header.items():
        begin, end = _span(path, name, item)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise _unsound(path, f"{name} begins at offset {begin}, the one before ends at {at}")
        at = end
    if at != size:
        raise _unsound(path, f"its tensors end at offset {at}, its data at {size}")


def _span(path: Path, name: str, item: Any) -> tuple[int, int]:
    try:
        (begin, end), shape, width = item["data_offsets"], item["shape"], WIDTH[item["dtype"]]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (begin, end, *shape))
    except (KeyError, TypeError, ValueError) as cause:
        raise _unsound(path, f"{name} has no dtype, shape and data_offsets that are known") from cause
    if not whole or end - begin != math.prod(shape) * width or end > 1 << 62:
        raise _unsound(path, f"{name} has shape {shape} of {item['dtype']} at offsets {begin} to {end}")
    return begin, end


def _unsound(path: Path, what: str) -> ModelError:
    return ModelError(what, fix="fetch the model again", file=str(path))
