"""The recipe's `data` node: sources, what is trained, lengths, packing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from llmkit.core.config import Later, config, setting


@config
class Jsonl:
    """One JSON object a line."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    columns: Mapping[str, str] = setting(make=dict)
    """What each of our columns is called in the file: `{prompt: question, completion: answer}`."""
    weight: float = setting(1.0, later=True)


@config
class Parquet:
    """A parquet file, read in record batches (needs pyarrow: `pip install llmkit[parquet]`)."""

    kind: Literal["parquet"] = "parquet"
    path: str
    columns: Mapping[str, str] = setting(make=dict)
    """What each of our columns is called in the file."""
    weight: float = setting(1.0, later=True)


@config
class Docstrings:
    """Function source -> first sentence of its docstring, from the running Python's standard library, split by module."""

    kind: Literal["docstrings"] = "docstrings"
    split: Literal["train", "valid"] = "train"


Source = Annotated[Jsonl | Parquet | Docstrings, Later(("csv", "text", "arrow", "hub", "python"))]


@config
class NoPacking:
    """One sequence a row, padded on the right."""

    kind: Literal["none"] = "none"


@config
class FirstFit:
    """The sequences of a step go, in order, into the first row with room."""

    kind: Literal["first_fit"] = "first_fit"


Packing = NoPacking | FirstFit


@config
class Data:
    """What is read, what of it is trained, and how it is laid out in rows."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...] = ()
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens count: the assistant's turns (or the completion), only the last of them, or all."""
    max_length: int = setting(1024, least=2)
    """Tokens of a row; longer examples meet `overflow`."""
    overflow: Literal["drop", "truncate", "split", "error"] = "drop"
    on_bad_row: Literal["error", "quarantine"] = "error"
    bad_share: float = setting(0.05, least=0.0, most=1.0)
    """Share of rows that may be unusable (empty, no assistant turn ...) before it is an error."""
    packing: Packing = FirstFit()
