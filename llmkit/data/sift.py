"""Leaves out of what was prepared the rows that a recipe does not want twice, or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from llmkit.core.errors import DataError
from llmkit.core.shelf import spilled
from llmkit.data.near import Contaminated, Left, asked
from llmkit.data.node import Data, Source
from llmkit.data.rows import Raw, Row, mapped

if TYPE_CHECKING:
    from llmkit.data.prepared import Prepared

T = TypeVar("T")
Sieve = Callable[[Row, str], Left | None]


@dataclass(frozen=True)
class Chosen(Sequence[T]):
    """Some items of a sequence, none of them read before it is asked for."""

    items: Sequence[T]
    kept: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...

    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        if isinstance(index, slice):
            return tuple(self.items[i] for i in self.kept[index].tolist())
        return self.items[int(self.kept[index])]


def sifted(made: Prepared, data: Data) -> Prepared:
    """The examples without those of copies and of contaminated rows; counted, with places in lint.

    Raises:
        DataError: an evaluation set cannot be read.
    """
    sieves = [sieve for sieve in (data.dedup.sieve(), _against(data)) if sieve is not None]
    if not sieves:
        return made
    kept, counts = [], dict(made.counts)
    last, out = -1, False
    for index, (row, (file, line)) in enumerate(zip(made.rows, made.places, strict=True)):
        if row.id != last:  # a row may give several examples
            last, left = row.id, _first(sieves, row, f"{file}:{line}")
            out = left is not None
            if left is not None:
                counts[f"left out: {left.name}"] = counts.get(f"left out: {left.name}", 0) + 1
                if made.lint is not None:
                    made.lint.note(left.name, file, line, left.detail)
        if not out:
            kept.append(index)
    return made if len(kept) == len(made) else _only(made, np.array(kept, dtype=np.int64), counts)


def _first(sieves: Sequence[Sieve], row: Row, place: str) -> Left | None:
    """What the first sieve that leaves it out says: those after it never see it."""
    return next((left for sieve in sieves if (left := sieve(row, place)) is not None), None)


def _only(made: Prepared, kept: np.ndarray[Any, np.dtype[np.int64]], counts: dict[str, int]) -> Prepared:
    ids = spilled((made.example(index)[0] for index in kept.tolist()), np.int32)
    weights = spilled((made.example(index)[1] for index in kept.tolist()), np.float32)
    starts = np.concatenate([[0], np.cumsum(np.diff(made.starts)[kept])]).astype(np.int64)
    counts |= {"examples": len(kept), "tokens": len(ids), "supervised tokens": int((weights > 0).sum())}
    digest = hashlib.sha256(made.digest.encode() + kept.tobytes()).hexdigest()
    return replace(
        made,
        ids=ids,
        weights=weights,
        starts=starts,
        rows=Chosen(made.rows, kept),
        places=Chosen(made.places, kept),
        counts=counts,
        digest=digest,
        begins=tuple(int(n) for n in np.searchsorted(kept, made.begins)),
    )


def _against(data: Data) -> Sieve | None:
    if not data.decontaminate:
        return None
    return Contaminated(_asked(data.decontaminate), data.contamination.ngram, data.contamination.share)


def _asked(sources: Sequence[Source]) -> Iterator[tuple[str, str]]:
    for number, source in enumerate(sources):
        rows = 0
        for raw in source.rows():
            if not isinstance(raw, Raw):
                raise raw
            rows += 1
            yield asked(raw, mapped(raw, source.columns)), f"{raw.file}:{raw.line}"
        if not rows:
            raise DataError("holds no rows", fix="give a file with rows", key=f"data.decontaminate.{number}")
