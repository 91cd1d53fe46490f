"""Documents laid end to end and cut to chunks: nothing is padded, lost or learned twice.

A chunk that ends within a document is followed by one that begins with its last token, which is not predicted again.
Joined, that holds where a chunk ends with a document too: every token but the very first is predicted once, the first
of a document from the end of the one before. Apart, every token but the first of each document is; a chunk then ends
one token early where a new document would get one place, which predicts nothing.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from llmkit.core.errors import DataError, ModelError
from llmkit.core.shelf import spilled
from llmkit.data.node import Data, Readable
from llmkit.data.prepare import prepare
from llmkit.data.prepared import Prepared
from llmkit.data.rows import BadRow, Row
from llmkit.data.sift import Chosen

LONGEST = 1 << 24
"""Tokens of a document: more than the letters of any row."""
Ids = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Cut:
    """A chunk: its tokens, where in them a document begins that is apart from what is before it, and which document
    its first token is of."""

    ids: Ids
    breaks: tuple[int, ...]
    first: int


class Cutter:
    """Cuts a stream of documents to chunks of `size` tokens."""

    def __init__(self, size: int, apart: bool) -> None:
        self.size, self.apart = size, apart
        self.held: list[Ids] = []
        self.length = self.first = self.last = 0
        self.breaks: list[int] = []

    def add(self, ids: Ids, number: int, rest: bool = False) -> Iterator[Cut]:
        """A document, or the rest of one; gives the chunks that it fills."""
        if self.apart and not rest and self.length:
            if self.length > self.size - 2:
                yield self._cut()
            else:
                self.breaks.append(self.length)
        at = 0
        while at < len(ids):
            if self.length == self.size:
                yield self._cut(repeat=True)
            self.first = self.first if self.held else number
            self.held.append(ids[at : at + self.size - self.length])
            at += len(self.held[-1])
            self.length, self.last = self.length + len(self.held[-1]), number

    def end(self) -> Iterator[Cut]:
        """What is left, however short it is."""
        if self.length > 1:
            yield self._cut()

    def _cut(self, repeat: bool = False) -> Cut:
        made = Cut(np.concatenate(self.held), tuple(self.breaks), self.first)
        self.held, self.breaks = [made.ids[-1:]] if repeat else [], []
        self.length, self.first = len(self.held), self.last
        return made


def chunked(
    sources: Sequence[Readable],
    data: Data,
    tokenizer: Any,
    apart: bool,
    end: str | None = None,
    key: str = "data.train",
    aside: Callable[[BadRow], None] | None = None,
    least: int = 1,
) -> Prepared:
    """The chunks of all documents, at least `least` of them; documents end in the token `end`.

    Raises:
        DataError: a row cannot be read, too many are unusable, or too few are left.
        ModelError: the tokenizer has no such token.
    """
    tokenizer = ending(tokenizer, end)
    whole = replace(data, train_on="all", max_length=LONGEST)
    documents = prepare(sources, whole, tokenizer, key, aside, documents=True)
    bounds: list[_Bounds] = []
    counts = documents.counts | {"documents": 0}
    mixed = data.mixed and key == "data.train"  # a chunk of a mix is of one source
    begins = documents.begins if mixed else (0, len(documents))
    found = _cuts(documents, begins, partial(Cutter, data.max_length, apart), tokenizer.eos_token_id, counts)
    ids = spilled(_noted(found, bounds), np.int32)
    if len(bounds) < least:
        what = f"{len(bounds)} chunks of {data.max_length} tokens do not fill one step of {least}"
        raise DataError(what, fix=f"set batch.rows={len(bounds)}, or lower data.max_length", key=key)
    made = _prepared(documents, bounds, ids, counts)
    firsts = np.array([chunk.first for chunk in bounds], dtype=np.int64)
    return replace(made, begins=tuple(int(n) for n in np.searchsorted(firsts, begins))) if mixed else made


def ending(tokenizer: Any, end: str | None) -> Any:
    """The tokenizer, whose end token is that of documents.

    Raises:
        ModelError: there is none.
    """
    known = tokenizer.get_added_vocab()
    if (end is None and tokenizer.eos_token_id is None) or (end is not None and end not in known):
        what = "the tokenizer has no end token" if end is None else f"{end} is no special token of the tokenizer"
        raise ModelError(what, fix=f"set end to one of {', '.join(list(known)[:8]) or 'its tokens'}", key="end")
    if end is None or end == tokenizer.eos_token:
        return tokenizer
    made = copy.deepcopy(tokenizer)  # the model's own goes on to end its answers as it did
    made.eos_token = end
    return made


def _cuts(
    documents: Prepared, begins: Sequence[int], cutter: Callable[[], Cutter], end: int, counts: dict[str, int]
) -> Iterator[Cut]:
    """The chunks of the documents [begins[i], begins[i + 1]) of each i."""
    for first, last in pairwise(begins):
        own, rest = cutter(), False
        for number in range(first, last):
            ids = documents.example(number)[0]
            twice = len(ids) > 2 and ids[-1] == ids[-2] == end  # a template that ends in it, and our own
            yield from own.add(ids[:-1] if twice else ids, number, rest)
            counts["documents"] += not rest
            rest = bool(ids[-1] != end)  # a piece has no end
        yield from own.end()


@dataclass(frozen=True)
class _Bounds:
    """Where a chunk begins among all tokens, where in it documents do, and which document its first token is of."""

    start: int
    breaks: tuple[int, ...]
    first: int


def _noted(cuts: Iterator[Cut], bounds: list[_Bounds]) -> Iterator[Ids]:
    """The tokens of chunks, whose bounds are kept."""
    at = 0
    for cut in cuts:
        bounds.append(_Bounds(at, tuple(at + place for place in cut.breaks), cut.first))
        at += len(cut.ids)
        yield cut.ids


def _prepared(documents: Prepared, bounds: Sequence[_Bounds], ids: Ids, counts: dict[str, int]) -> Prepared:
    starts = np.array([*(chunk.start for chunk in bounds), len(ids)], dtype=np.int64)
    breaks = np.array([place for chunk in bounds for place in chunk.breaks], dtype=np.int64)
    weights = np.ones(len(ids), dtype=np.float32)
    weights[starts[:-1]] = weights[breaks] = 0.0  # nothing predicts what begins
    counts |= {"examples": len(bounds), "tokens": len(ids), "supervised tokens": int((weights > 0).sum())}
    digest = hashlib.sha256(b"".join(part.tobytes() for part in (ids, weights, starts, breaks))).hexdigest()
    return replace(
        documents,
        ids=ids,
        weights=weights,
        starts=starts,
        rows=tuple(Row(number, str(number)) for number in range(len(bounds))),
        counts=counts,
        digest=digest,
        places=Chosen(documents.places, np.array([chunk.first for chunk in bounds], dtype=np.int64)),
        begins=(),
        breaks=breaks,
    )
