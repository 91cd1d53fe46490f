"""Rows of Hugging Face data sets, by their name on the Hub or by a folder, through the library `datasets`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.core.errors import DataError
from llmkit.core.files import sha256
from llmkit.core.network import reachable
from llmkit.data.rows import At, BadRow, Raw

NAME = r"[\w.-]+(/[\w.-]+)?"
COMMIT = r"[0-9a-f]{40}"
BATCH = 64
"""Rows that are made into Python's values together."""
FORMATS = ("parquet", "json", "csv", "text", "arrow", "cache")
"""The readers of `datasets` that give plain rows; `cache` is what one of them made before."""


def read_hub(
    name: str, subset: str | None, split: str, revision: str | None, after: At = (), take: int | None = None
) -> Iterator[Raw | BadRow]:
    """The rows of a split; begins behind the row `after` at once.

    Raises:
        DataError: there is no such data set, or it cannot be had.
    """
    table = _table(name, subset, split, revision).with_format("arrow")
    rows = len(table) if take is None else min(take, len(table))
    for start in range(after[0] if after else 0, rows, BATCH):
        for place, values in enumerate(table[start : min(start + BATCH, rows)].to_pylist(), start + 1):
            yield Raw(values, name, place, at=(place,))


def hub_files(name: str, subset: str | None, split: str, revision: str | None) -> dict[str, str]:
    """sha256 of the Arrow files that the rows are read from, by the data set's name, its commit and their own."""
    table = _table(name, subset, split, revision)
    found = [Path(item["filename"]) for item in table.cache_files]
    commit = next((path.parent.name[:12] for path in found if re.fullmatch(COMMIT, path.parent.name)), "")
    title, root = f"{name}@{commit}" if commit else name, Path(name).expanduser().resolve()
    inside = {
        path: path.relative_to(root) if path.is_relative_to(root) else path.name for path in map(Path.resolve, found)
    }
    return {f"{title}/{place}": sha256(path) for path, place in inside.items()}


def _table(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    try:
        import datasets
    except ImportError as missing:
        raise DataError(f"kind: hub needs datasets ({missing})", fix="pip install datasets", file=name) from missing
    datasets.disable_progress_bars()
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local:
        _only_hub(name, revision, "revision", "a folder has none")
    elif not re.fullmatch(NAME, name) or name in FORMATS:
        raise DataError("is no folder, and no name of a data set", fix="give OWNER/NAME or a folder", file=name)
    try:
        if local and ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
            _only_hub(name, subset, "subset", "a saved data set has none")
            return _saved(datasets.load_from_disk(str(folder)), split, datasets)
        if not local:
            _check_network(name, revision)
        made = datasets.load_dataset_builder(str(folder) if local else name, subset, revision=revision)
        _check_builder(made, name, revision)
        made.download_and_prepare()
        return made.as_dataset(split=split)
    except DataError:
        raise
    except Exception as cause:  # the library lets through what its readers and the network raise
        why = (str(cause).splitlines() or [type(cause).__name__])[0][:300]
        raise DataError(f"cannot be had ({why})", fix=_fix(cause), file=name) from cause


def _fix(cause: Exception) -> str:
    words = str(cause).lower()
    if "config" in words:
        return "set subset to one of them"
    if "split" in words:
        return "set split to one of them"
    if "not cached" in words or "offline" in words:
        return "connect to the Hub, or give a folder"
    return "mend its name in the recipe, or give a folder"


def _only_hub(name: str, value: str | None, key: str, why: str) -> None:
    if value is not None:
        raise DataError(f"is here, and {why}", fix=f"leave {key} out", file=name, key=key)


def _check_network(name: str, revision: str | None) -> None:
    """Refuses at once what a library would try for minutes, or would answer with another revision."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode() and os.environ.get("HF_HUB_OFFLINE") != "1":
        what = "this process began offline, and stays so"
        raise DataError(what, fix="run it in a process of its own", file=name)
    if is_offline_mode():
        if revision is not None and not re.fullmatch(COMMIT, revision):
            what = f"nobody can say offline which commit {revision} is"
            raise DataError(what, fix="give the commit, or leave revision out", file=name, key="revision")
    elif not reachable(constants.ENDPOINT):
        what = f"{constants.ENDPOINT} cannot be reached"
        raise DataError(what, fix="connect, or set HF_HUB_OFFLINE=1 to read what is in the cache", file=name)


def _check_builder(made: Any, name: str, revision: str | None) -> None:
    reader = type(made).__mro__[1].__module__ if type(made).__module__ == "abc" else type(made).__module__
    form = reader.removeprefix("datasets.packaged_modules.").split(".")[0]
    if form not in FORMATS:
        raise DataError(f"holds {form}, and no plain rows", fix="give a data set of rows", file=name)
    if form == "cache" and revision is not None and made.hash != revision:
        what = f"the cache holds commit {made.hash}, not {revision}"
        raise DataError(what, fix="connect to the Hub, or leave revision out", file=name, key="revision")


def _saved(found: Any, split: str, datasets: Any) -> Any:
    """A split, or a part of one, of what `save_to_disk` wrote."""
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    sizes = {name: len(table) for name, table in splits.items()}
    spans = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    parts = [
        splits[s.splitname].select(range(s.from_ or 0, sizes[s.splitname] if s.to is None else s.to)) for s in spans
    ]
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
