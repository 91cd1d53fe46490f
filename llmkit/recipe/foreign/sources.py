"""A source of rows from the way that other tools name one: a file here, or a data set of the Hub."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

KINDS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
KINDS |= {".txt": "text"}
PACKED = (".gz", ".bz2", ".xz", ".zst")


def source(path: str, subset: Any = None, split: Any = None, revision: Any = None, files: Any = None) -> dict[str, Any]:
    """A source; a path that ends as files of rows do is a file, everything else is a data set's name."""
    name = PurePosixPath(path)
    ending = name.with_suffix("").suffix if name.suffix in PACKED else name.suffix
    if ending in KINDS:
        return {"kind": KINDS[ending], "path": path}
    if files and path in ("json", "csv", "parquet", "text"):
        named = [files] if isinstance(files, str) else list(files)
        kinds = {source(str(name))["kind"] for name in named} - {"hub"}
        return {"kind": kinds.pop() if len(kinds) == 1 else {"json": "jsonl"}.get(path, path), "path": files}
    made = {"kind": "hub", "name": path}
    given = {"subset": subset, "split": split, "revision": revision}
    return made | {key: value for key, value in given.items() if value and value not in ("default", "train")}
