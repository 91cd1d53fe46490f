"""From sources to token ids with weights, everything counted.

Rows are read, shaped, rendered and cut in this process: nothing is left to workers that could die or hang.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.core.errors import DataError
from llmkit.data.node import Data, Rows
from llmkit.data.render import Rendered, Renderer
from llmkit.data.rows import BadRow, Raw, Row, Unusable
from llmkit.data.usable import Tally, usable

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
    places: tuple[tuple[str, int], ...] = ()
    """File and line of each example's row."""
    breaks: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Where within examples something begins that sees nothing of what is before it."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def length(self, index: int) -> int:
        """Tokens of an example."""
        return int(self.starts[index + 1] - self.starts[index])

    def example(self, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(ids, weights) of an example; the weight of a token is its weight as a target."""
        here = slice(self.starts[index], self.starts[index + 1])
        return self.ids[here], self.weights[here]

    def segments(self, index: int) -> list[tuple[int, int]]:
        """The stretches [start, end) of an example that see themselves alone; one, where it has no breaks."""
        first, last = int(self.starts[index]), int(self.starts[index + 1])
        low, high = np.searchsorted(self.breaks, (first, last))
        cuts = [0, *(int(place) - first for place in self.breaks[low:high]), last - first]
        return list(itertools.pairwise(cuts))

    def supervised(self, index: int) -> float:
        """The sum of weights that an example trains with: its first token is never a target."""
        return float(self.weights[self.starts[index] + 1 : self.starts[index + 1]].sum())


def prepare(
    sources: Sequence[Rows],
    data: Data,
    tokenizer: Any,
    key: str = "data.train",
    aside: Callable[[BadRow], None] | None = None,
    least: int = 1,
) -> Prepared:
    """All examples of `sources`, at least `least` of them.

    Raises:
        DataError: a row cannot be read, too many are unusable, or too few are left.
    """
    tally = Tally(data, Counter[str](), aside)
    counts = tally.counts
    ids: list[np.ndarray[Any, Any]] = []
    weights: list[np.ndarray[Any, Any]] = []
    rows: list[Row] = []
    places: list[tuple[str, int]] = []
    for raw, row, tokens, kept in _encoded(sources, Renderer(tokenizer, data.train_on), tally):
        for part_ids, part_weights in _fitted(tokens, kept, data, counts, raw):
            ids.append(np.array(part_ids, dtype=np.int32))
            weights.append(np.array(part_weights, dtype=np.float32))
            rows.append(row)
            places.append((raw.file, raw.line))
    tally.check(len(ids), least, key)
    starts = np.concatenate([[0], np.cumsum([len(part) for part in ids])]).astype(np.int64)
    joined, weighed = np.concatenate(ids), np.concatenate(weights)
    weighed[starts[:-1]] = 0.0  # nothing predicts the first token of an example
    counts["examples"] = len(ids)
    counts["tokens"] = len(joined)
    counts["supervised tokens"] = int((weighed > 0).sum())
    digest = hashlib.sha256(joined.tobytes() + weighed.tobytes() + starts.tobytes()).hexdigest()
    return Prepared(joined, weighed, starts, tuple(rows), dict(counts), digest, files_of(sources), tuple(places))


def _encoded(
    sources: Sequence[Rows], renderer: Renderer, tally: Tally
) -> Iterator[tuple[Raw, Row, list[int], list[float]]]:
    """Rows with their tokens; encoded some hundred at a time, which the tokenizer does faster."""
    waiting: list[tuple[Raw, Row, Rendered]] = []
    for raw, row in usable(sources, tally):
        try:
            turns = renderer.turns(row)
        except Unusable as reason:
            tally.unusable(raw, str(reason))
            continue
        waiting += [(raw, row, rendered) for rendered in turns]
        tally.counts["special text kept plain"] += bool(turns[0].mark)
        tally.counts["end not trained: the template's markers leave it out"] += turns[-1].unended
        tally.counts["one example an answer: the template rewrites earlier turns"] += len(turns) > 1
        if len(waiting) >= CHUNK:
            yield from _flush(waiting, renderer)
            waiting = []
    yield from _flush(waiting, renderer)


def _flush(
    waiting: list[tuple[Raw, Row, Rendered]], renderer: Renderer
) -> Iterator[tuple[Raw, Row, list[int], list[float]]]:
    encoded = renderer.encode([rendered for *_, rendered in waiting])
    for (raw, row, _), (ids, weights) in zip(waiting, encoded, strict=True):
        yield raw, row, ids, weights


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


def files_of(sources: Sequence[Rows]) -> dict[str, str]:
    """sha256 by name; by the whole path where two files have one name."""
    found = {path: digest for source in sources for path, digest in source.files().items()}
    names = Counter(Path(path).name for path in found)
    return {Path(path).name if names[Path(path).name] == 1 else path: digest for path, digest in found.items()}


def template_digest(tokenizer: Any) -> str:
    """sha256 of the chat template."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()
