"""Rows of Arrow files (IPC files and streams), record batch by record batch, and of folders that `datasets` saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from llmkit.core.errors import DataError
from llmkit.data.claims import claimed
from llmkit.data.rows import At, BadRow, Raw
from llmkit.data.sources import opened
from llmkit.data.stores import in_store, unreadable
from llmkit.data.unpack import FREE, MOST_RATIO

BATCH = 64
"""Rows that are made into Python's values together, at most."""
BEGIN, END = b"ARROW1\0\0", b"\xff\xff\xff\xff\0\0\0\0"
"""What a file begins with, and what a stream ends with."""


def read_arrow(path: str, after: At = ()) -> Iterator[Raw | BadRow]:
    """The rows of an Arrow file; those of the batches before `after` are not read.

    Raises:
        DataError: it is not Arrow, is cut short or damaged, or would unpack to far more than it is.
    """
    try:
        import pyarrow
    except ImportError as missing:
        raise DataError(f"arrow needs pyarrow ({missing})", fix="pip install pyarrow", file=path) from missing
    first, within, line = after or (0, 0, 0)
    with opened(path, "arrow") as file:
        try:
            held = pyarrow.PythonFile(file, "r") if in_store(path) else pyarrow.memory_map(path)
            for index, batch in _batches(held, path, first):
                for place in range(within if index == first else 0, batch.num_rows, step := _together(batch)):
                    for more, values in enumerate(batch.slice(place, step).to_pylist(), 1):
                        line += 1
                        yield Raw(values, path, line, at=(index, place + more, line))
        except (OSError, ValueError, pyarrow.ArrowException) as cause:
            why = (str(cause).splitlines() or [type(cause).__name__])[0][:120]
            raise DataError(f"is no whole Arrow file ({why})", fix="write it again", file=path, line=line) from cause


def _batches(held: Any, path: str, first: int) -> Iterator[tuple[int, Any]]:
    """(number, batch) from the number `first` on; each is known to be sound before anything points into it."""
    from pyarrow import ipc

    size, whole = held.size(), False
    if size >= len(BEGIN):
        held.seek(0)
        whole = held.read(len(BEGIN)) == BEGIN
    if not whole:
        held.seek(max(0, size - len(END)))
        if held.read() != END:
            raise ValueError("the mark of its end is missing")
    reader = ipc.open_file(held) if whole else None
    held.seek(len(BEGIN) if whole else 0)
    _check_size(ipc.MessageReader.open_stream(held), path)
    held.seek(0)
    stream = enumerate(ipc.open_stream(held)) if reader is None else _numbered(reader, first)
    for index, batch in stream:
        if index >= first:
            batch.validate(full=True)
            yield index, batch


def _numbered(reader: Any, first: int) -> Iterator[tuple[int, Any]]:
    return ((index, reader.get_batch(index)) for index in range(first, reader.num_record_batches))


def _check_size(messages: Any, path: str) -> None:
    """Refuses a message that is small on the disk and huge in memory."""
    for message in messages:
        body = message.body
        packed, total = (
            (0, 0) if body is None else (body.size, claimed(message.metadata.to_pybytes(), memoryview(body)))
        )
        if total > max(FREE, MOST_RATIO * packed):
            what = f"a batch unpacks from {packed} bytes to {total / 2**30:.1f} GiB"
            raise DataError(what, fix="check where the file comes from", file=path)


def _together(batch: Any) -> int:
    """Rows that are unpacked together: one value, as large as the batch, may stand in each."""
    return max(1, min(BATCH, FREE // max(1, int(batch.get_total_buffer_size()))))


def saved(paths: str | Sequence[str], split: str | None) -> list[str]:
    """The paths, with the files of a folder that `datasets` saved in its place.

    Raises:
        DataError: a folder is none of those, or has another split.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        folder = Path(path).expanduser()
        whole = not in_store(path) and folder.is_dir()
        if split is not None and not (whole and (folder / "dataset_dict.json").is_file()):
            raise DataError(f"has no splits, and {split} is asked for", fix="leave split out", file=path, key="split")
        found += _files_of(_split(folder, split)) if whole else [path]
    return found


def _split(folder: Path, split: str | None) -> Path:
    if not (folder / "dataset_dict.json").is_file():
        return folder
    splits = [str(name) for name in _json(folder / "dataset_dict.json").get("splits", [])]
    if split not in splits:
        what = f"has the splits {', '.join(splits)}" + (f", and no {split}" if split is not None else "")
        raise DataError(what, fix="set split to one of them", file=str(folder), key="split")
    return folder / split


def _files_of(folder: Path) -> list[str]:
    """The files of one data set, in their order."""
    said = _json(folder / "state.json")
    names = [str(item.get("filename")) for item in said.get("_data_files", []) if isinstance(item, dict)]
    if not names or any(name != PurePath(name).name or name == ".." for name in names):
        raise DataError("names no data files of its own", fix="save it again", file=str(folder / "state.json"))
    if said.get("_indices_files"):
        raise DataError("holds a selection of its rows", fix="use kind: hub", file=str(folder / "state.json"))
    return [str(folder / name) for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        if not path.is_file():
            fix = "give the folder of a saved data set, or its files"
            raise DataError(f"has no {path.name}", fix=fix, file=str(path.parent)) from cause
        raise unreadable(str(path), cause) from cause
    except (ValueError, RecursionError) as cause:
        raise DataError("is not JSON", fix="save the data set again", file=str(path)) from cause
    if not isinstance(said, dict):
        raise DataError("is no object", fix="save the data set again", file=str(path))
    return said
