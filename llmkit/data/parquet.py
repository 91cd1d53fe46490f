"""Rows of parquet files, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.core.errors import DataError
from llmkit.data.rows import At, BadRow, Raw
from llmkit.data.sources import opened

BATCH = 64
"""Rows that are unpacked together, at most."""
MOST_RATIO, FREE = 200, 1 << 28
"""A row group may unpack to so many times its size; groups below `FREE` bytes are let pass."""


def read_parquet(path: str | Path, after: At = ()) -> Iterator[Raw | BadRow]:
    """The rows of a parquet file; groups before `after` are not read, rows of its own group are passed over.

    Raises:
        DataError: it is not parquet, is cut short or damaged, or would unpack to far more than it is.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as missing:
        raise DataError(f"parquet needs pyarrow ({missing})", fix="pip install pyarrow", file=str(path)) from missing
    first, within = after or (0, 0)
    line = 0
    with opened(path, "parquet") as file:
        try:
            table = parquet.ParquetFile(file)
            _check_size(table.metadata, path)
            line = within + sum(table.metadata.row_group(group).num_rows for group in range(first))
            for group in range(first, table.num_row_groups):
                for place, values in _group(table, group, within if group == first else 0):
                    line += 1
                    yield Raw(values, str(path), line, at=(group, place + 1))
        except (OSError, pyarrow.ArrowException) as cause:
            why = (str(cause).splitlines() or [type(cause).__name__])[0][:120]
            raise DataError(
                f"is no whole parquet file ({why})", fix="write it again", file=str(path), line=line
            ) from cause


def _group(table: Any, group: int, first: int) -> Iterator[tuple[int, Any]]:
    """(place, values) of the rows of one group from `first` on."""
    place = 0
    for batch in table.iter_batches(_together(table.metadata), row_groups=[group]):
        skipped = max(0, min(first - place, batch.num_rows))
        yield from enumerate(batch.slice(skipped).to_pylist(), place + skipped)
        place += batch.num_rows


def _check_size(metadata: Any, path: str | Path) -> None:
    """Refuses a row group that is small on the disk and huge in memory."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        packed = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        if group.total_byte_size > max(FREE, MOST_RATIO * packed):
            what = f"row group {number} unpacks from {packed} bytes to {group.total_byte_size / 2**30:.1f} GiB"
            raise DataError(what, fix="check where the file comes from", file=str(path))


def _together(metadata: Any) -> int:
    """Rows that are unpacked together: one value of a group's dictionary, as long as the group, may stand in each."""
    groups = (metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return max(1, min(BATCH, FREE // max([1, *map(int, groups)])))
