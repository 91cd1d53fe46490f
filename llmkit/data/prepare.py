"""From sources to token ids with weights, everything counted.

Rows are read, shaped, rendered and cut in this process: nothing is left to workers that could die or hang.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.core.errors import DataError
from llmkit.data.node import Data, Docstrings, Source
from llmkit.data.render import Rendered, Renderer
from llmkit.data.rows import Raw, Row, Unusable, mapped, shaped

CHUNK = 256


@dataclass(frozen=True)
class Prepared:
    """Token ids and weights of all examples, end to end; example i is [starts[i], starts[i + 1])."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    weights: np.ndarray[Any, np.dtype[np.float32]]
    starts: np.ndarray[Any, np.dtype[np.int64]]
    rows: tuple[Row, ...]
    """The row of each example; a split row gives several examples."""
    counts: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each file that was read."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def length(self, index: int) -> int:
        """Tokens of an example."""
        return int(self.starts[index + 1] - self.starts[index])

    def example(self, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(ids, weights) of an example; the weight of a token is its weight as a target."""
        here = slice(self.starts[index], self.starts[index + 1])
        return self.ids[here], self.weights[here]

    def supervised(self, index: int) -> float:
        """The sum of weights that an example trains with: its first token is never a target."""
        return float(self.weights[self.starts[index] + 1 : self.starts[index + 1]].sum())


def read_rows(
    sources: Sequence[Source], data: Data, counts: Counter[str], aside: Callable[[DataError], None] | None = None
) -> Iterator[Row]:
    """The usable rows of all sources in order; the others are counted under their reason."""
    index = 0
    for source in sources:
        columns = {} if isinstance(source, Docstrings) else source.columns
        for raw in source.rows():
            counts["rows"] += 1
            if isinstance(raw, DataError):
                if data.on_bad_row == "error" or aside is None:
                    raise raw
                counts["quarantined"] += 1
                aside(raw)
                continue
            try:
                row = shaped(mapped(raw, columns), index)
            except Unusable as reason:
                _unusable(raw, str(reason), data, counts, aside)
                continue
            index += 1
            yield row


def _unusable(
    raw: Raw, reason: str, data: Data, counts: Counter[str], aside: Callable[[DataError], None] | None
) -> None:
    counts[f"unusable: {reason}"] += 1
    if data.on_bad_row == "quarantine" and aside is not None:
        aside(DataError(reason, file=raw.file, line=raw.line))


def prepare(
    sources: Sequence[Source],
    data: Data,
    tokenizer: Any,
    key: str = "data.train",
    aside: Callable[[DataError], None] | None = None,
) -> Prepared:
    """All examples of `sources`.

    Raises:
        DataError: a row cannot be read, too many are unusable, or none is left.
    """
    renderer, counts = Renderer(tokenizer, data.train_on), Counter[str]()
    ids: list[np.ndarray[Any, Any]] = []
    weights: list[np.ndarray[Any, Any]] = []
    rows: list[Row] = []
    for row, tokens, kept in _encoded(read_rows(sources, data, counts, aside), renderer, counts):
        for part_ids, part_weights in _fitted(tokens, kept, data, counts, row):
            ids.append(np.array(part_ids, dtype=np.int32))
            weights.append(np.array(part_weights, dtype=np.float32))
            rows.append(row)
    _check(counts, len(ids), data, key)
    starts = np.concatenate([[0], np.cumsum([len(part) for part in ids])]).astype(np.int64)
    files = {Path(s.path).name: _file_digest(Path(s.path)) for s in sources if not isinstance(s, Docstrings)}
    joined, weighed = np.concatenate(ids), np.concatenate(weights)
    counts["examples"] = len(ids)
    counts["tokens"] = len(joined)
    counts["supervised tokens"] = int((weighed > 0).sum())
    digest = hashlib.sha256(joined.tobytes() + weighed.tobytes() + starts.tobytes()).hexdigest()
    return Prepared(joined, weighed, starts, tuple(rows), dict(counts), digest, files)


def _encoded(
    rows: Iterator[Row], renderer: Renderer, counts: Counter[str]
) -> Iterator[tuple[Row, list[int], list[float]]]:
    waiting: list[tuple[Row, Rendered]] = []
    for row in rows:
        try:
            waiting.append((row, renderer.render(row)))
        except Unusable as reason:
            counts[f"unusable: {reason}"] += 1
            continue
        counts["special text kept plain"] += waiting[-1][1].marked
        if len(waiting) == CHUNK:
            yield from _flush(waiting, renderer)
            waiting = []
    yield from _flush(waiting, renderer)


def _flush(waiting: list[tuple[Row, Rendered]], renderer: Renderer) -> Iterator[tuple[Row, list[int], list[float]]]:
    encoded = renderer.encode([rendered for _, rendered in waiting])
    for (row, _), (ids, weights) in zip(waiting, encoded, strict=True):
        yield row, ids, weights


def _fitted(
    ids: list[int], weights: list[float], data: Data, counts: Counter[str], row: Row
) -> Iterator[tuple[list[int], list[float]]]:
    """The example as it is, or what `overflow` makes of it; what would teach nothing is left out."""
    parts = [(ids, weights)]
    if len(ids) > data.max_length:
        counts[f"overflow: {data.overflow}"] += 1
        if data.overflow == "error":
            raise DataError(
                f"row {row.id} has {len(ids)} tokens, more than data.max_length {data.max_length}",
                fix="raise data.max_length, or set data.overflow",
                key="data.overflow",
            )
        size = data.max_length
        cuts = {"drop": [], "truncate": [0], "split": list(range(0, len(ids), size))}[data.overflow]
        parts = [(ids[at : at + size], weights[at : at + size]) for at in cuts]
    for part in parts:
        if sum(part[1][1:]) > 0:
            yield part
        else:
            counts["nothing to learn"] += 1


def _check(counts: Counter[str], kept: int, data: Data, key: str) -> None:
    table = ", ".join(f"{reason}: {n}" for reason, n in counts.most_common())
    bad = sum(n for reason, n in counts.items() if reason.startswith("unusable"))
    if counts["rows"] == 0:
        raise DataError("holds no rows", fix="give a file with rows", key=key)
    if bad > data.bad_share * counts["rows"]:
        raise DataError(
            f"{bad} of {counts['rows']} rows cannot be used ({table})",
            fix="mend them, or raise data.bad_share",
            key=key,
        )
    if not kept:
        raise DataError(
            f"no row is left to learn from ({table})", fix="raise data.max_length or mend the rows", key=key
        )


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def template_digest(tokenizer: Any) -> str:
    """sha256 of the chat template."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()
