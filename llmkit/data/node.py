"""The recipe's `data` node: sources, what is trained, lengths, packing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from llmkit.core.config import Later, config, setting
from llmkit.core.errors import DataError

if TYPE_CHECKING:
    from llmkit.data.rows import Raw


@config
class Jsonl:
    """One JSON object a line."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    columns: Mapping[str, str] = setting(default_factory=dict)
    """What each of our columns is called in the file: `{prompt: question, completion: answer}`."""
    weight: float = setting(default=1.0, later=True)

    def rows(self) -> Iterator[Raw | DataError]:
        """Each object, or the error that its line is."""
        from llmkit.data.rows import read_jsonl

        return read_jsonl(Path(self.path))


@config
class Parquet:
    """A parquet file, read in record batches (needs pyarrow: `pip install llmkit[parquet]`)."""

    kind: Literal["parquet"] = "parquet"
    path: str
    columns: Mapping[str, str] = setting(default_factory=dict)
    """What each of our columns is called in the file."""
    weight: float = setting(default=1.0, later=True)

    def rows(self) -> Iterator[Raw | DataError]:
        """Each row of the file."""
        from llmkit.data.rows import read_parquet

        return read_parquet(Path(self.path))


@config
class Docstrings:
    """Function source -> first sentence of its docstring, from the running Python's own library, split by module."""

    kind: Literal["docstrings"] = "docstrings"
    split: Literal["train", "valid"] = "train"

    def rows(self) -> Iterator[Raw | DataError]:
        """Each pair of the split."""
        from llmkit.data.docstrings import read

        return read(self.split)


Source = Annotated[Jsonl | Parquet | Docstrings, Later(("csv", "text", "arrow", "hub", "python"))]


@config
class NoPacking:
    """One sequence a row, padded on the right."""

    kind: Literal["none"] = "none"

    def pack(self, lengths: Sequence[int], capacity: int) -> list[list[int]]:
        """Rows as lists of indices into `lengths`."""
        return [[index] for index in range(len(lengths))]


@config
class FirstFit:
    """The sequences of a step go, in order, into the first row with room."""

    kind: Literal["first_fit"] = "first_fit"

    def pack(self, lengths: Sequence[int], capacity: int) -> list[list[int]]:
        """Rows as lists of indices into `lengths`; none holds more than `capacity` tokens."""
        rows: list[list[int]] = []
        room: list[int] = []
        for index, length in enumerate(lengths):
            row = next((i for i, left in enumerate(room) if left >= length), None)
            if row is None:
                rows.append([])
                room.append(capacity)
                row = len(rows) - 1
            rows[row].append(index)
            room[row] -= length
        return rows


Packing = NoPacking | FirstFit


@config
class Data:
    """What is read, what of it is trained, and how it is laid out in rows."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...] = ()
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens count: the assistant's turns (or the completion), only the last of them, or all."""
    max_length: int = setting(default=1024, least=2, most=1 << 24)
    """Tokens of a row; longer examples meet `overflow`."""
    overflow: Literal["drop", "truncate", "split", "error"] = "drop"
    on_bad_row: Literal["error", "quarantine"] = "error"
    bad_share: float = setting(default=0.05, least=0.0, most=1.0)
    """Share of rows that may be unusable (empty, no assistant turn ...) before it is an error."""
    packing: Packing = FirstFit()
