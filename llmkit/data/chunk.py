"""Some rows of a source, from objects as they are read to token ids with weights: a pure function of the rows.

It is the same function for all that make examples: in this process, in helpers beside it, and over a stream.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import numpy as np

from llmkit.core.errors import DataError
from llmkit.data.encode import Rendered
from llmkit.data.lint import Lint
from llmkit.data.lint_store import restored, state
from llmkit.data.node import Data
from llmkit.data.render import Renderer
from llmkit.data.rows import BadRow, Raw, Row, Unusable
from llmkit.data.usable import Tally, usable_rows

ROWS = 256
"""Rows of a chunk: the tokenizer takes many texts faster than one."""


@dataclass(frozen=True)
class Law:
    """What decides, beside the rows, which examples they make."""

    data: Data
    columns: Mapping[str, str]
    sketches: bool = False
    """Whether lint keeps what near copies in another data set are found by."""
    strict: bool = True
    """Whether a row that cannot be read is an error."""
    documents: bool = False
    """Whether each row is a document, which ends in the end token whatever its format."""

    @property
    def linted(self) -> bool:
        """Whether lint looks at the rows."""
        return self.data.lint.level != "off"

    def lint(self, renderer: Renderer, held: Mapping[str, Any] | None = None) -> Lint | None:
        """An observer that saw nothing yet, or what is `held` of one."""
        if not self.linted:
            return None
        made = Lint(renderer, self.data.max_length, self.data.overflow, sketches=self.sketches)
        return made if held is None else restored(made, held)


@dataclass
class Chunk:
    """Examples end to end, and an account of the rows that they are made of."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    weights: np.ndarray[Any, np.dtype[np.float32]]
    lengths: list[int]
    owners: list[int]
    """Which of `rows` each example is of."""
    rows: list[bytes]
    """As JSON: the rows that give examples."""
    places: list[tuple[str, int]]
    """File and line of each of `rows`."""
    counts: dict[str, int]
    bad: list[BadRow]
    """Rows that were set aside, in their order."""
    first: str
    """The first row that cannot be used, and why."""
    lint: Mapping[str, Any] | None = None
    """The state of the observer."""


@dataclass
class _Made:
    ids: list[np.ndarray[Any, Any]] = field(default_factory=list)
    weights: list[np.ndarray[Any, Any]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)


def chunk(found: Sequence[Raw | BadRow], base: int, law: Law, renderer: Renderer) -> Chunk:
    """The examples of some rows, the first of which is row `base` of its source.

    Raises:
        DataError: a row cannot be read and is not to be set aside.
    """
    bad: list[BadRow] = []
    tally = Tally(law.data, Counter[str](), None if law.strict else bad.append, lint=law.lint(renderer))
    made, last, named = _Made(), None, law.columns.get("cluster", "cluster")
    for raw, row, tokens, kept in _encoded(found, base, law, renderer, tally):
        for part_ids, part_weights in _fitted(tokens, kept, law.data, tally.counts, raw):
            if row is not last:
                made.rows.append(row)
                made.places.append((raw.file, raw.line))
                made.own.append(raw.values.get(named) is not None)
                last = row
            made.ids.append(np.array(part_ids, dtype=np.int32))
            made.weights.append(np.array(part_weights, dtype=np.float32))
            made.weights[-1][0] = 0.0  # nothing predicts the first token of an example
            made.owners.append(len(made.rows) - 1)
    rows = [kept_row(row, own) for row, own in zip(made.rows, made.own, strict=True)]
    return Chunk(
        np.concatenate([np.empty(0, np.int32), *made.ids]),
        np.concatenate([np.empty(0, np.float32), *made.weights]),
        [len(part) for part in made.ids],
        made.owners,
        rows,
        made.places,
        dict(tally.counts),
        bad,
        tally.first,
        state(tally.lint) if tally.lint is not None else None,
    )


def _encoded(
    found: Sequence[Raw | BadRow], base: int, law: Law, renderer: Renderer, tally: Tally
) -> Iterator[tuple[Raw, Row, list[int], list[float]]]:
    waiting: list[tuple[Raw, Row, Rendered]] = []
    for raw, row in usable_rows(found, law.columns, tally, base):
        try:
            turns = tuple(_piece(rendered, raw, law.documents) for rendered in renderer.turns(row))
        except Unusable as reason:
            tally.unusable(raw, str(reason))
            continue
        waiting += [(raw, row, rendered) for rendered in turns]
        tally.counts["special text kept plain"] += bool(turns[0].mark)
        tally.counts["end not trained: the template's markers leave it out"] += turns[-1].unended
        tally.counts["one example an answer: the template rewrites earlier turns"] += len(turns) > 1
    encoded = renderer.encode([rendered for *_, rendered in waiting])
    last: Row | None = None
    for (raw, row, rendered), (ids, weights) in zip(waiting, encoded, strict=True):
        if tally.lint is not None:  # the examples of one row are never parted
            tally.lint.see(raw, row, rendered, ids, weights, first=row is not last)
        last = row
        yield raw, row, ids, weights


def _piece(rendered: Rendered, raw: Raw, document: bool) -> Rendered:
    """A piece of a document neither begins nor ends where it was cut."""
    close, special = (rendered.close or document) and not raw.more, rendered.special and not raw.rest
    return (
        rendered
        if (close, special) == (rendered.close, rendered.special)
        else replace(rendered, close=close, special=special)
    )


def _fitted(
    ids: list[int], weights: list[float], data: Data, counts: Counter[str], raw: Raw
) -> Iterator[tuple[list[int], list[float]]]:
    """The example as it is, or what `overflow` makes of it; what would teach nothing is left out.

    A split repeats the last token of a piece as the first of the next, where it is not predicted again: every token is
    trained exactly once.
    """
    size = data.max_length
    parts = [(ids, weights)]
    if len(ids) > size:
        counts[f"overflow: {data.overflow}"] += 1
        if data.overflow == "error":
            raise DataError(
                f"has {len(ids)} tokens, more than data.max_length {size}",
                fix="raise data.max_length, or set data.overflow",
                file=raw.file,
                line=raw.line,
                key="data.overflow",
            )
        cuts = {"drop": [], "truncate": [0], "split": list(range(0, len(ids) - 1, size - 1))}[data.overflow]
        parts = [(ids[at : at + size], weights[at : at + size]) for at in cuts]
    for part in parts:
        if sum(part[1][1:]) > 0:
            yield part
        else:
            counts["nothing to learn"] += 1


_DEFAULTS = {f.name: f.default for f in fields(Row) if f.default is not MISSING}


def kept_row(row: Row, own: bool) -> bytes:
    """A row as JSON; its cluster only where the row says one, since that of any other is its number.

    What JSON has no word for (a date from a table, say) is kept as its text.
    """
    said = {f.name: getattr(row, f.name) for f in fields(Row)}
    said = {name: value for name, value in said.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}
    if not own:
        del said["cluster"]
    return json.dumps(said, default=str).encode()


def row_of(said: bytes, base: int) -> Row:
    """The row again, as one of several sources: `base` rows are before those of its own."""
    values: dict[str, Any] = json.loads(said)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    number = values.pop("id") + base
    return Row(id=number, cluster=values.pop("cluster", str(number)), **values)
