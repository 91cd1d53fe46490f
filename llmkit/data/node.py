"""The recipe's `data` node: sources, what is trained, lengths, packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from llmkit.core.config import Conflict, config, setting
from llmkit.data.cleaning import Contamination, Dedup, Linting, NoDedup
from llmkit.data.held_out import Readable, Side
from llmkit.data.mix import Mix
from llmkit.data.pack import first_fit
from llmkit.data.rules import BUFFER, mix_problems, stream_problems
from llmkit.data.source_nodes import Arithmetic, Arrow, Csv, Docstrings, Hub, Jsonl, Parquet, Source, Text

__all__ = [
    "Arithmetic",
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
class Sampler:
    """Which rows a step is made of, where not each row once an epoch."""

    balance: Literal["label", "group"]
    """Every label (or every value of the column `group`) fills an equal share of the steps, whatever its share of the
    rows: rare ones come again within an epoch, common ones wait for a later one. An epoch is as long as without it."""


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
    mix: Mix = Mix()
    """How sources are mixed that have a `weight`; without weights, all rows are shuffled together."""
    streaming: bool = False
    """Whether `train` is read while it is trained on, and never as a whole: it needs `steps`."""
    buffer: int = setting(default=BUFFER, least=1, most=1 << 20)
    """Rows of a stream that are shuffled together."""

    sampler: Sampler | None = None
    """Left out, every row comes once an epoch, in an order of its own; labels come with `kind: classify`."""
    length_buckets: int | None = setting(default=None, least=2)
    """Every step takes its rows from one of so many buckets of rows of like length, which saves padding where rows are
    not packed. Every row still comes once an epoch; but a step sees rows alike in length, and in what goes with it."""

    @property
    def mixed(self) -> bool:
        """Whether the sources of `train` have shares."""
        return len(self.train) > 1 and (any(s.weight is not None for s in self.train) or self.mix.temperature != 1.0)

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what: lists of nothing, weights, what a stream cannot do, two words on one thing."""
        yield from mix_problems(self)
        yield from stream_problems(self)
        if self.valid and self.held_out.share:
            yield Conflict("held_out", "both say what validates", "keep one of the two", "valid")
        if self.train_on == ():
            yield Conflict("train_on", "names no role", "use assistant")
        if self.contamination != Contamination() and not self.decontaminate:
            what = "there is no evaluation set to compare with"
            yield Conflict("contamination", what, "give data.decontaminate", "decontaminate")
        for key, name in (("sampler", "the sampler"), ("length_buckets", "length_buckets")):
            if getattr(self, key) is not None and (self.mixed or self.streaming):
                what, other = f"{name} takes rows from all over one set", "streaming" if self.streaming else "mix"
                yield Conflict(key, what, "leave one of the two out", other)
        if self.length_buckets is None:
            return
        if isinstance(self.packing, FirstFit):
            what = "packed rows have no padding that it could save"
            yield Conflict("length_buckets", what, "set packing: none, or drop length_buckets", "packing.kind")
        if self.sampler is not None:
            what = "the sampler chooses the rows of a step already"
            yield Conflict("length_buckets", what, "keep one of the two", "sampler.balance")

    def sources(self, side: Literal["train", "valid"]) -> tuple[Readable, ...]:
        """What is trained on, or what validates."""
        share, seed = self.held_out.share, self.held_out.seed
        if share:
            return tuple(Side(source, share, seed, side == "valid") for source in self.train)
        return self.train if side == "train" else self.valid
