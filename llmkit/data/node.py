"""The recipe's `data` node: sources, what is trained, lengths, packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from llmkit.core.config import Conflict, config, setting
from llmkit.data.cleaning import Contamination, Dedup, Linting, NoDedup
from llmkit.data.mix import Mix, schedule_problems, weight_at
from llmkit.data.pack import first_fit
from llmkit.data.source_nodes import Arrow, Csv, Docstrings, Hub, Jsonl, Parquet, Source, Text

__all__ = [
    "Arrow",
    "Csv",
    "Data",
    "Docstrings",
    "FirstFit",
    "Hub",
    "Jsonl",
    "NoPacking",
    "Packing",
    "Parquet",
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
    mix: Mix = Mix()
    """How sources are mixed that have a `weight`; without weights, all rows are shuffled together."""
    streaming: bool = False
    """Whether `train` is read while it is trained on, and never as a whole: it needs `steps`."""
    buffer: int = setting(default=4096, least=1, most=1 << 20)
    """Rows of a stream that are shuffled together."""

    @property
    def mixed(self) -> bool:
        """Whether the sources of `train` have shares."""
        return len(self.train) > 1 and (any(s.weight is not None for s in self.train) or self.mix.temperature != 1.0)

    def problems(self) -> Iterator[Conflict]:
        """A list of no role; weights that contradict, or are none; what a stream cannot do."""
        yield from self._weights()
        yield from self._streams()
        if self.train_on == ():
            yield Conflict("train_on", "names no role", "use assistant")
        if self.contamination != Contamination() and not self.decontaminate:
            what = "there is no evaluation set to compare with"
            yield Conflict("contamination", what, "give data.decontaminate", "decontaminate")

    def _weights(self) -> Iterator[Conflict]:
        given = [index for index, source in enumerate(self.train) if source.weight is not None]
        for index, source in enumerate(self.train):
            yield from schedule_problems(source.weight, f"train.{index}.weight")
            if source.weight is None and given:
                what = "is missing, and another source has one"
                yield Conflict(
                    f"train.{index}.weight", what, "give each source one, or none", f"train.{given[0]}.weight"
                )
        for key, sources in (("valid", self.valid), ("decontaminate", self.decontaminate)):
            for index, source in enumerate(sources):
                if source.weight is not None:
                    yield Conflict(f"{key}.{index}.weight", "is of no use: these rows are not mixed", "leave it out")
        if self.mix != Mix() and not self.mixed:
            yield Conflict("mix", "nothing is mixed", "give each source of train a weight, or leave it out", "train")
        ends = sorted({0.0, 1.0, *(at for s in self.train if isinstance(s.weight, tuple) for at, _ in s.weight)})
        for part in ends if len(given) == len(self.train) else ():
            if self.mixed and not any(weight_at(s.weight, part) for s in self.train if s.weight):
                yield Conflict("train", f"no source has a share at {part:g} of the run", "give one a weight there")

    def _streams(self) -> Iterator[Conflict]:
        if not self.streaming:
            if self.buffer != type(self).__dataclass_fields__["buffer"].default:
                yield Conflict("buffer", "is of a stream", "set streaming: true, or leave it out", "streaming")
            return
        if not self.train:
            return
        if len(self.train) > 1 and any(source.weight is None for source in self.train):
            what = "the sizes of streams are not known"
            yield Conflict("streaming", what, "give each source a weight", "train.0.weight")
        if not isinstance(self.dedup, NoDedup):
            yield Conflict("dedup", "a stream is never seen as a whole", "leave it out, or streaming", "streaming")
        if self.lint.level == "error":
            what = "a stream is linted by `llmkit check` alone"
            yield Conflict("lint.level", what, "set lint: warn, or leave streaming out", "streaming")
        if self.decontaminate:
            what = "a stream is not compared with evaluation sets"
            yield Conflict("decontaminate", what, "leave it out, or streaming", "streaming")
