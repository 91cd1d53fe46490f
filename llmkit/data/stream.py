"""Streams: sources that are read while they are trained on, in windows of `buffer` rows, each shuffled in itself.

What a stream gives is a function of (seed, source, pass, window) and the rows: to go on from any step, a checkpoint
holds of each source where its window begins, as the source tells places, and how many examples of it are taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from threading import Lock, Thread
from typing import Any

import numpy as np

from llmkit.core.errors import DataError
from llmkit.core.seed import mixed
from llmkit.data.chunk import ROWS, Chunk, Law, chunk
from llmkit.data.node import Readable
from llmkit.data.order import keyed
from llmkit.data.render import Renderer
from llmkit.data.rows import At, BadRow, Raw, place_of
from llmkit.data.usable import Tally

DEADLINE = 600.0
"""Seconds that a window may take."""


@dataclass(frozen=True)
class Place:
    """Where a stream is: all that a checkpoint holds of it."""

    passes: int = 0
    """How often the source was read to its end."""
    window: int = 0
    """Of this pass."""
    at: At = ()
    """The row behind which the window begins, as its source says it."""
    row: int = 0
    """How many rows of the pass are before the window."""
    taken: int = 0
    """Examples of the window that were given."""
    given: int = 0
    """Examples of the pass that are before the window."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """The account of all rows before the window."""


@dataclass(frozen=True)
class Example:
    """One example of a stream."""

    ids: np.ndarray[Any, Any]
    weights: np.ndarray[Any, Any]
    place: tuple[str, int]


@dataclass(frozen=True)
class _Window:
    place: Place
    """Where it begins."""
    examples: Sequence[Example] = ()
    rows: int = 0
    at: At = ()
    """Its last row."""
    counts: Counter[str] = field(default_factory=Counter)
    bad: Sequence[BadRow] = ()
    first: str = ""

    def next(self, full: int) -> Place:
        """Where the one behind it begins; a window of less than `full` rows is the last of its pass."""
        place, counts = self.place, dict(Counter(self.place.counts) + self.counts)
        if self.rows < full:
            return Place(place.passes + 1, counts=counts)
        given = place.given + len(self.examples)
        return Place(place.passes, place.window + 1, self.at, place.row + self.rows, 0, given, counts)


class _Ahead:
    """A window that a thread makes; it does not keep the process from ending."""

    def __init__(self, make: Callable[[], _Window]) -> None:
        self.made: _Window | None = None
        self.failed: BaseException | None = None
        self.thread = Thread(target=self._run, args=(make,), daemon=True, name="stream")
        self.thread.start()

    def __enter__(self) -> None:
        """What goes wrong from here on is kept, and raised where the window is asked for."""

    def __exit__(self, kind: Any, cause: BaseException | None, trace: Any) -> bool:
        self.failed = cause
        return True

    def _run(self, make: Callable[[], _Window]) -> None:
        with self:
            self.made = make()


class Stream:
    """The examples of one source, for ever: read to its end, it begins anew in another order."""

    def __init__(
        self,
        source: Readable,
        law: Law,
        renderer: Renderer,
        alone: Lock,
        seed: int,
        key: str,
        aside: Callable[[BadRow], None] | None = None,
    ) -> None:
        self.source, self.law, self.renderer, self.alone = source, law, renderer, alone
        self.seed, self.key, self.aside = seed, key, aside
        self.taken = 0
        """Examples of the window that were given."""
        self.seen = ""
        """The last row that was read."""
        self._rows: Iterator[Raw | BadRow] = iter(())
        self._ahead: _Ahead | None = None
        self._now = _Window(Place())
        self._order: Sequence[int] = ()

    def begin(self, place: Place) -> None:
        """Goes to a place.

        Raises:
            DataError: as `take`.
        """
        if self._ahead is not None:
            self._ahead.thread.join(DEADLINE)
        self._rows = self.source.rows(tuple(place.at))
        self._ahead = _Ahead(lambda: self._load(replace(place, taken=0)))
        self._enter()
        while not self._order:
            self._enter()
        self.taken = place.taken

    @property
    def place(self) -> Place:
        """Where it is."""
        return replace(self._now.place, taken=self.taken)

    @property
    def counts(self) -> Counter[str]:
        """The account of all rows up to the end of the window."""
        return Counter(self._now.place.counts) + self._now.counts

    @property
    def whole(self) -> int | None:
        """The examples of a pass, where the first window holds all of it."""
        now = self._now
        return len(now.examples) if now.rows < self.law.data.buffer and now.place.window == 0 else None

    def take(self) -> Example:
        """The next example.

        Raises:
            DataError: a row cannot be read, too many are unusable, none is left, or the source does not answer.
        """
        while self.taken >= len(self._order):
            self._enter()
        example = self._now.examples[self._order[self.taken]]
        self.taken += 1
        return example

    def _enter(self) -> None:
        """Makes the window ahead the current one, and has the one behind it read meanwhile."""
        window, full = self._waited(), self.law.data.buffer
        place, whole = window.place, window.rows < full
        if place.passes == 0 and self.aside is not None:
            for bad in window.bad:
                self.aside(bad)
        self._now, self.taken = window, 0
        tally = Tally(self.law.data, self.counts, first=window.first)
        if place.row + window.rows == 0:
            tally.counts["rows"] = 0
        tally.check(place.given + len(window.examples) if whole else 1, 1, self.key)
        self._order = keyed(mixed(self.seed, place.passes), place.window, len(window.examples)).tolist()
        after = window.next(full)
        self._ahead = _Ahead(lambda: self._load(after))

    def _waited(self) -> _Window:
        ahead = self._ahead
        if ahead is None:
            raise DataError("is not open", fix="begin it", key=self.key)
        ahead.thread.join(DEADLINE)
        if ahead.failed is not None:
            raise ahead.failed
        if ahead.made is None:
            what = f"gave no rows for {DEADLINE:.0f} s; the last one read is {self.seen or 'none'}"
            raise DataError(what, fix="see whether its disk or store answers", key=self.key)
        return ahead.made

    def _load(self, place: Place) -> _Window:
        if not place.at:
            self._rows = self.source.rows()
        full, rows, at = self.law.data.buffer, 0, place.at
        chunks: list[Chunk] = []
        while here := list(islice(self._rows, min(ROWS, full - rows))):
            self.seen, at = place_of(here[-1]), here[-1].at
            with self.alone:
                chunks.append(chunk(here, place.row + rows, self.law, self.renderer))
            rows += len(here)
        counts = sum((Counter(one.counts) for one in chunks), Counter[str]())
        examples = [example for one in chunks for example in _examples(one)]
        bad = [row for one in chunks for row in one.bad]
        first = next((one.first for one in chunks if one.first), "")
        return _Window(place, examples, rows, at, counts, bad, first)


def _examples(made: Chunk) -> Iterator[Example]:
    at = 0
    for length, owner in zip(made.lengths, made.owners, strict=True):
        yield Example(made.ids[at : at + length], made.weights[at : at + length], made.places[owner])
        at += length
