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
from llmkit.core.files import sha256
from llmkit.data.lint import Lint
from llmkit.data.node import Data, Docstrings, Source
from llmkit.data.render import Rendered, Renderer
from llmkit.data.rows import BadRow, Raw, Row, Unusable
from llmkit.data.sift import sifted
from llmkit.data.usable import Tally, usable

CHUNK = 256


@dataclass(frozen=True)
class Prepared:
    """Token ids and weights of all examples, end to end; example i is [starts[i], starts[i + 1])."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    weights: np.ndarray[Any, np.dtype[np.float32]]
    starts: np.ndarray[Any, np.dtype[np.int64]]
    rows: Sequence[Row]
    """The row of each example; a split row gives several examples."""
    counts: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each file that was read."""
    places: Sequence[tuple[str, int]] = ()
    """File and line of each example's row."""
    lint: Lint | None = None
    """What is odd about the rows; None where nobody asks."""

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


def prepare(
    sources: Sequence[Source],
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
    renderer = Renderer(tokenizer, data.train_on, data.train_reasoning)
    lint = None
    if data.lint.level != "off":
        lint = Lint(renderer, data.max_length, data.overflow, sketches=bool(data.valid))
    tally = Tally(data, Counter[str](), aside, lint=lint)
    counts = tally.counts
    ids: list[np.ndarray[Any, Any]] = []
    weights: list[np.ndarray[Any, Any]] = []
    rows: list[Row] = []
    places: list[tuple[str, int]] = []
    for raw, row, tokens, kept in _encoded(sources, renderer, tally):
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
    files = _files(sources)
    made = Prepared(joined, weighed, starts, tuple(rows), dict(counts), digest, files, tuple(places), lint)
    if key == "data.train":
        made = sifted(made, data)
        counts.update({name: n for name, n in made.counts.items() if name.startswith("left out")})
        tally.check(len(made), least, key)
    return made


def _encoded(
    sources: Sequence[Source], renderer: Renderer, tally: Tally
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
            yield from _flush(waiting, renderer, tally.lint)
            waiting = []
    yield from _flush(waiting, renderer, tally.lint)


def _flush(
    waiting: list[tuple[Raw, Row, Rendered]], renderer: Renderer, lint: Lint | None
) -> Iterator[tuple[Raw, Row, list[int], list[float]]]:
    encoded = renderer.encode([rendered for *_, rendered in waiting])
    last: Row | None = None
    for (raw, row, rendered), (ids, weights) in zip(waiting, encoded, strict=True):
        if lint is not None:  # the examples of one row are never parted
            lint.see(raw, row, rendered, ids, weights, first=row is not last)
        last = row
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


def _files(sources: Sequence[Source]) -> dict[str, str]:
    """sha256 by name; by the whole path where two files have one name."""
    paths = list(dict.fromkeys(Path(s.path) for s in sources if not isinstance(s, Docstrings)))
    names = Counter(path.name for path in paths)
    return {path.name if names[path.name] == 1 else str(path): sha256(path) for path in paths}


def template_digest(tokenizer: Any) -> str:
    """sha256 of the chat template."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()
