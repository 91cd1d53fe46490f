"""Documents laid end to end and cut to chunks: nothing is padded, lost or learned twice.

A chunk that ends within a document is followed by one that begins with its last token, which is not predicted again.
Joined, that holds where a chunk ends with a document too: every token but the very first is predicted once, the first
of a document from the end of the one before. Apart, every token but the first of each document is; a chunk then ends
one token early where a new document would get one place, which predicts nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from llmkit.core.errors import ModelError
from llmkit.data.chunk import ROWS as CHUNK
from llmkit.data.node import Data, Rows
from llmkit.data.prepare import Prepared, files_of
from llmkit.data.render import Rendered, Renderer
from llmkit.data.rows import BadRow, Raw, Row, Unusable
from llmkit.data.usable import Tally, usable


@dataclass(frozen=True)
class Chunk:
    """Tokens, where in them a document begins that is apart from what is before it, and where the first was read."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    breaks: tuple[int, ...]
    row: Row
    place: tuple[str, int]


class Chunks:
    """Cuts a stream of documents to chunks of `size` tokens."""

    def __init__(self, size: int, apart: bool) -> None:
        self.size, self.apart = size, apart
        self.ids: list[int] = []
        self.breaks: list[int] = []
        self.first: tuple[Row, tuple[str, int]] | None = None

    def add(self, ids: Sequence[int], row: Row, place: tuple[str, int], rest: bool = False) -> Iterator[Chunk]:
        """A document, or the rest of one; gives the chunks that it fills."""
        if self.apart and not rest and self.ids:
            if len(self.ids) > self.size - 2:
                yield self._cut()
            else:
                self.breaks.append(len(self.ids))
        at = 0
        while at < len(ids):
            if len(self.ids) == self.size:
                yield self._cut(repeat=True)
            self.first = self.first or (row, place)
            more = ids[at : at + self.size - len(self.ids)]
            self.ids.extend(more)
            at += len(more)

    def end(self) -> Iterator[Chunk]:
        """What is left, however short it is."""
        if len(self.ids) > 1:
            yield self._cut()

    def _cut(self, repeat: bool = False) -> Chunk:
        row, place = self.first or (Row(0, "0"), ("", 0))
        made = Chunk(np.array(self.ids, dtype=np.int32), tuple(self.breaks), row, place)
        self.ids, self.breaks, self.first = self.ids[-1:] if repeat else [], [], None
        return made


def chunked(
    sources: Sequence[Rows],
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
    renderer, tally = Renderer(tokenizer, "all"), Tally(data, Counter[str](), aside)
    made, begins, mixed = list[Chunk](), [0], data.mixed and key == "data.train"
    for together in [[source] for source in sources] if mixed else [sources]:  # a chunk of a mix is of one source
        cutter = Chunks(data.max_length, apart)
        for raw, row, ids in _documents(together, renderer, tally, end_token(tokenizer, end)):
            made += cutter.add(ids, row, (raw.file, raw.line), raw.rest)
        made += cutter.end()
        begins.append(len(made))
    tally.check(len(made), least, key)
    return replace(_prepared(made, tally.counts, files_of(sources)), begins=tuple(begins) if mixed else ())


def end_token(tokenizer: Any, end: str | None) -> int:
    """The id of the token that documents end in.

    Raises:
        ModelError: there is none.
    """
    if end is None and tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    known = tokenizer.get_added_vocab()
    if end is None or end not in known:
        what = "the tokenizer has no end token" if end is None else f"{end} is no special token of the tokenizer"
        raise ModelError(what, fix=f"set end to one of {', '.join(list(known)[:8]) or 'its tokens'}", key="end")
    return int(known[end])


def _documents(
    sources: Sequence[Rows], renderer: Renderer, tally: Tally, end: int
) -> Iterator[tuple[Raw, Row, list[int]]]:
    """Each row as a document with its end, or as a piece of one."""
    found = _rendered(sources, renderer, tally)
    while waiting := list(islice(found, CHUNK)):
        for (raw, row, _), (ids, _) in zip(waiting, renderer.encode([r for *_, r in waiting]), strict=True):
            yield raw, replace(row, completion="", messages=()), ids if raw.more else [*ids, end]


def _rendered(sources: Sequence[Rows], renderer: Renderer, tally: Tally) -> Iterator[tuple[Raw, Row, Rendered]]:
    for raw, row in usable(sources, tally):
        try:
            said = renderer.render(row)
        except Unusable as reason:
            tally.unusable(raw, str(reason))
            continue
        tally.counts["special text kept plain"] += bool(said.mark)
        tally.counts["documents"] += not raw.rest
        yield raw, row, replace(said, close=False, special=said.special and not raw.rest)


def _prepared(chunks: Sequence[Chunk], counts: Counter[str], files: dict[str, str]) -> Prepared:
    ids = np.concatenate([chunk.ids for chunk in chunks])
    starts = np.concatenate([[0], np.cumsum([len(chunk.ids) for chunk in chunks])]).astype(np.int64)
    pairs = zip(chunks, starts[:-1], strict=True)
    breaks = np.array([start + place for chunk, start in pairs for place in chunk.breaks], dtype=np.int64)
    weights = np.ones(len(ids), dtype=np.float32)
    weights[starts[:-1]] = weights[breaks] = 0.0  # nothing predicts what begins
    counts |= {"examples": len(chunks), "tokens": len(ids), "supervised tokens": int((weights > 0).sum())}
    digest = hashlib.sha256(b"".join(part.tobytes() for part in (ids, weights, starts, breaks))).hexdigest()
    rows, places = tuple(chunk.row for chunk in chunks), tuple(chunk.place for chunk in chunks)
    return Prepared(ids, weights, starts, rows, dict(counts), digest, files, places, breaks=breaks)
