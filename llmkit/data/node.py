"""The recipe's `data` node: sources, what is trained, lengths, packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from llmkit.core.config import Conflict, config, setting
from llmkit.data.cleaning import Contamination, Dedup, Linting, NoDedup
from llmkit.data.held_out import Readable, Side
from llmkit.data.pack import first_fit
from llmkit.data.source_nodes import Arrow, Csv, Docstrings, Hub, Jsonl, Parquet, Source, Text

__all__ = [
    "Arrow",
    "Csv",
    "Data",
    "Docstrings",
    "FirstFit",
    "HeldOut",
    "Hub",
    "Jsonl",
    "NoPacking",
    "Packing",
    "Parquet",
    "Readable",
    "Source",
    "Text",
]


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
class HeldOut:
    """Training rows that validate instead of being trained on."""

    _short: ClassVar[str] = "share"
    share: float = setting(default=0.0, least=0.0, below=1.0)
    """Which share of them, about; a hash of a row (or of its `cluster`) decides, so that equal rows stay together."""
    seed: int = setting(default=0, least=0)
    """Another seed holds out others."""


@config
class Data:
    """What is read, what of it is trained, and how it is laid out in rows."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...] = ()
    held_out: HeldOut = HeldOut()
    """A share of the rows of `train` that takes the place of `valid`: `held_out: 0.05`."""
    system: str | None = None
    """The system message of conversations that have none."""
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
        """A list of no role, two words on what validates, and words on nothing."""
        if self.valid and self.held_out.share:
            yield Conflict("held_out", "both say what validates", "keep one of the two", "valid")
        if self.train_on == ():
            yield Conflict("train_on", "names no role", "use assistant")
        if self.contamination != Contamination() and not self.decontaminate:
            what = "there is no evaluation set to compare with"
            yield Conflict("contamination", what, "give data.decontaminate", "decontaminate")

    def sources(self, side: Literal["train", "valid"]) -> tuple[Readable, ...]:
        """What is trained on, or what validates."""
        share, seed = self.held_out.share, self.held_out.seed
        if share:
            return tuple(Side(source, share, seed, side == "valid") for source in self.train)
        return self.train if side == "train" else self.valid
