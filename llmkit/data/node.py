"""The recipe's `data` node: sources, what is trained, lengths, packing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from llmkit.core.config import Conflict, Later, config, setting
from llmkit.core.errors import DataError
from llmkit.data.cleaning import Contamination, Dedup, Linting, NoDedup
from llmkit.data.pack import first_fit

if TYPE_CHECKING:
    from llmkit.data.rows import Raw

COLUMNS = ("messages", "prompt", "completion", "text", "tools", "cluster", "choices", "label", "transcript")
"""Our names of columns."""


def _unknown(columns: Mapping[str, str]) -> Iterator[Conflict]:
    for name in columns:
        if name not in COLUMNS:
            yield Conflict(f"columns.{name}", "is no column of ours", f"use one of {', '.join(COLUMNS)}")


@config
class Jsonl:
    """One JSON object a line."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    columns: Mapping[str, str] = setting(default_factory=dict)
    """What each of our columns is called in the file: `{prompt: question, completion: answer}`."""
    weight: float = setting(default=1.0, later=True)

    def problems(self) -> Iterator[Conflict]:
        """Names in `columns` that nothing reads."""
        return _unknown(self.columns)

    def rows(self) -> Iterator[Raw | DataError]:
        """Each object, or the error that its line is."""
        from llmkit.data.jsonl import read_jsonl

        return read_jsonl(Path(self.path))


@config
class Parquet:
    """A parquet file, read in record batches (needs `pip install pyarrow`)."""

    kind: Literal["parquet"] = "parquet"
    path: str
    columns: Mapping[str, str] = setting(default_factory=dict)
    """What each of our columns is called in the file."""
    weight: float = setting(default=1.0, later=True)

    def problems(self) -> Iterator[Conflict]:
        """Names in `columns` that nothing reads."""
        return _unknown(self.columns)

    def rows(self) -> Iterator[Raw | DataError]:
        """Each row of the file."""
        from llmkit.data.parquet import read_parquet

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
        return first_fit(lengths, capacity)


Packing = NoPacking | FirstFit


@config
class Data:
    """What is read, what of it is trained, and how it is laid out in rows."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...] = ()
    train_on: Literal["assistant", "last", "all"] | tuple[Literal["user", "assistant", "tool", "system"], ...] = (
        "assistant"
    )
    """Which tokens count: the assistant's turns (or the completion), only the last of them, or all; or the turns of the
    roles in a list: `[assistant, tool]`. The `weight` of a message comes before its role's."""
    train_reasoning: bool = True
    """Whether what an answer thinks is trained, or what it says alone."""
    max_length: int = setting(default=1024, least=2, most=1 << 24)
    """Tokens of a row; longer examples meet `overflow`."""
    overflow: Literal["drop", "truncate", "split", "error"] = "drop"
    on_bad_row: Literal["error", "quarantine"] = "error"
    bad_share: float = setting(default=0.05, least=0.0, most=1.0)
    """Share of rows that may be unusable (empty, no assistant turn ...) before it is an error."""
    dedup: Dedup = NoDedup()
    """Which copies of training rows are left out; the first one stays."""
    decontaminate: tuple[Source, ...] = ()
    """Evaluation sets: training rows that hold their questions are left out."""
    contamination: Contamination = Contamination()
    lint: Linting = Linting()
    """What is looked for in the rows, and what is done about it."""
    packing: Packing = FirstFit()

    def problems(self) -> Iterator[Conflict]:
        """A list of no role."""
        if self.train_on == ():
            yield Conflict("train_on", "names no role", "use assistant")
        if self.contamination != Contamination() and not self.decontaminate:
            what = "there is no evaluation set to compare with"
            yield Conflict("contamination", what, "give data.decontaminate", "decontaminate")
