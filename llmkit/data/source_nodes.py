"""The sources of rows: each a recipe node whose verbs give its rows, and the files that they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from llmkit.core.config import Conflict, Later, config, setting

if TYPE_CHECKING:
    from llmkit.data.rows import At, BadRow, Raw

COLUMNS = ("messages", "prompt", "completion", "text", "tools", "cluster", "choices", "label")
"""Our names of columns."""


class Rows(Protocol):
    """What every source can do."""

    @property
    def columns(self) -> Mapping[str, str]:
        """What each of our columns is called there."""

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each row, or the error that it is; `after` is the place of a row (its `at`), behind which reading begins."""

    def files(self) -> dict[str, str]:
        """sha256 of each file that is read, by its path."""


@config
class Files:
    """Rows of one file after the other."""

    kind: str
    path: str | tuple[str, ...]
    """A file, a glob (`rows/*.jsonl`), whose files are read in the order of their names, or a list of these."""
    columns: Mapping[str, str] = setting(default_factory=dict)
    """What each of our columns is called in the file: `{prompt: question, completion: answer}`."""
    take: int | None = setting(default=None, least=1)
    """The first so many rows; all of them when not given."""
    weight: float = setting(default=1.0, later=True)

    def problems(self) -> Iterator[Conflict]:
        """Names in `columns` that nothing reads."""
        for name in self.columns:
            if name not in COLUMNS:
                yield Conflict(f"columns.{name}", "is no column of ours", f"use one of {', '.join(COLUMNS)}")

    def files(self) -> dict[str, str]:
        """sha256 of each file that is read, by its path."""
        from llmkit.data.sources import digests

        return digests(self.path)


@config
class Jsonl(Files):
    """One JSON object a line."""

    kind: Literal["jsonl"] = "jsonl"

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each object, or the error that its line is; begins behind the row `after` at once."""
        from llmkit.data.jsonl import read_jsonl
        from llmkit.data.sources import chained

        return chained(self.path, read_jsonl, after, self.take)


@config
class Parquet(Files):
    """A parquet file, read in record batches (needs `pip install pyarrow`)."""

    kind: Literal["parquet"] = "parquet"

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each row of the file; begins behind the row `after` within its row group's size."""
        from llmkit.data.parquet import read_parquet
        from llmkit.data.sources import chained

        return chained(self.path, read_parquet, after, self.take)


@config
class Docstrings:
    """Function source -> first sentence of its docstring, from the running Python's own library, split by module."""

    columns: ClassVar[Mapping[str, str]] = {}
    kind: Literal["docstrings"] = "docstrings"
    split: Literal["train", "valid"] = "train"

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each pair of the split; all that is before `after` is made again."""
        from llmkit.data.docstrings import read

        return read(self.split, after)

    def files(self) -> dict[str, str]:
        """Nothing: the running Python is named in the manifest."""
        return {}


Source = Annotated[Jsonl | Parquet | Docstrings, Later(("csv", "text", "arrow", "hub", "python"))]
