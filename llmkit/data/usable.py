"""Reading sources: which rows can be used, and an account of those that cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.core.errors import DataError
from llmkit.data.lint import Lint
from llmkit.data.node import Data, Readable
from llmkit.data.rows import BadRow, Raw, Row, Unusable, bounded, introduced, mapped, rejected
from llmkit.data.shapes import shaped

COLUMNS = ", and its columns are "
NO_PROMPT = "no prompt or messages"
"""Of a row that is to ask something, and need not have an answer."""
MAPS = {
    "no messages,": "map them: columns: {prompt: ..., completion: ...}",
    "no chosen": "map them: columns: {prompt: ..., chosen: ..., rejected: ...}",
    NO_PROMPT: "map it: columns: {prompt: ...}",
    "no prompt: ": "map it: columns: {prompt: ...}",
}
"""The way out by how a reason begins: rows of other columns than ours."""
QUESTIONS = ("question", "query", "instruction", "input", "problem")
"""What others call a prompt."""


def _columns(raw: Raw, reason: str) -> str:
    """What there is, where it is not what a row of ours is made of."""
    named = ", ".join(list(map(str, raw.values))[:8])
    return f"{COLUMNS}{named}" if reason.startswith(tuple(MAPS)) and named else ""


def _way(first: str) -> str:
    """The way out by what is told of the first row; a column that is called as prompts often are is named."""
    told, _, named = first.rpartition(COLUMNS)
    way = next((way for begin, way in MAPS.items() if f": {begin}" in told), "")
    asked = next((name for name in QUESTIONS if name in named.split(", ")), "...")
    return way if "prompt" in named.split(", ") else way.replace("prompt: ...", f"prompt: {asked}")


@dataclass
class Tally:
    """Counts rows that cannot be used, and hands them on where they are to be kept."""

    data: Data
    counts: Counter[str]
    aside: Callable[[BadRow], None] | None = None
    first: str = ""
    lint: Lint | None = None
    counted: str = "rows"
    """The key of `batch` that says how many examples a step has."""

    def broken(self, bad: DataError) -> None:
        """A row that cannot be read."""
        if self.data.on_bad_row == "error" or self.aside is None or not isinstance(bad, BadRow):
            raise bad
        self.counts["quarantined"] += 1
        if self.lint is not None:
            problem = bad.problems[0]
            self.lint.refused(problem.file, problem.line, problem.what, "broken")
        self.aside(bad)

    def unusable(self, raw: Raw, reason: str) -> None:
        """A row that is read and cannot be trained on."""
        self.counts[f"unusable: {reason}"] += 1
        self.first = self.first or f"{raw.file}:{raw.line}: {reason}{_columns(raw, reason)}"
        if self.lint is not None:
            self.lint.refused(raw.file, raw.line, reason)
        if self.data.on_bad_row == "quarantine" and self.aside is not None:
            self.aside(rejected(raw, reason))

    def _files(self, key: str) -> str:
        """What was read for a key of `data`."""
        if key not in ("data", "data.train", "data.valid"):
            return ""
        sources = self.data.sources("valid" if key == "data.valid" else "train")
        return ", ".join(dict.fromkeys(path for source in sources for path in source.files()))

    def _none(self, key: str) -> DataError:
        """The error that no row is."""
        what, fix, share = "holds no rows", "give a file with rows", self.data.held_out.share
        there = share and any(True for source in self.data.train for _ in source.rows())
        if there and key == "data.train":
            what, fix = f"holds no rows: data.held_out={share:g} takes them all", "lower data.held_out"
        elif there and key == "data.valid":
            what, fix = f"holds no rows: data.held_out={share:g} takes none of them", "raise data.held_out"
        return DataError(what, fix=fix, file="" if there else self._files(key), key=key)

    def check(self, kept: int, least: int, key: str) -> None:
        """Raises: DataError when too many rows are unusable, or too few are left."""
        counts, training = self.counts, key.startswith("data.")
        table = ", ".join(f"{reason} {n}" for reason, n in counts.most_common() if reason != "rows" and n)
        bad = sum(n for reason, n in counts.items() if reason.startswith("unusable"))
        if counts["rows"] == 0:
            raise self._none(key)
        if bad > self.data.bad_share * counts["rows"]:
            what = f"{bad} of {counts['rows']} rows cannot be used ({table}; the first is {self.first})"
            fix = "mend them, or raise data.bad_share" if training and bad < counts["rows"] else "mend them"
            raise DataError(what, fix=_way(self.first) or fix, key=key)
        if not kept:
            what = f"no row is left to learn from ({table})"
            raise DataError(
                what, fix="raise data.max_length or mend the rows" if training else "mend the rows", key=key
            )
        if kept < least:
            what = f"{kept} examples do not fill one step of {least}" + (f" ({table})" if table else "")
            raise DataError(what, fix=f"set batch.{self.counted}={kept}", key=key)


def readable(sources: Sequence[Readable], tally: Tally) -> Iterator[tuple[Raw, Mapping[str, Any]]]:
    """The rows of all sources in order, each with its values under our names.

    Raises:
        DataError: a row cannot be read and is not to be set aside, or lacks a column that was mapped.
    """
    for source in sources:
        for _, raw in _bounded(source.rows(), tally, 0):
            yield raw, mapped(raw, source.columns)


def usable(sources: Sequence[Readable], tally: Tally) -> Iterator[tuple[Raw, Row]]:
    """The usable rows of all sources in order; the others are counted under their reason.

    Raises:
        DataError: a row cannot be read and is not to be set aside.
    """
    for source in sources:
        yield from usable_rows(source.rows(), source.columns, tally, tally.counts["rows"])


def usable_rows(
    rows: Iterable[Raw | BadRow], columns: Mapping[str, str], tally: Tally, base: int = 0
) -> Iterator[tuple[Raw, Row]]:
    """The usable ones of some rows, which are numbered from `base` on.

    Raises:
        DataError: a row cannot be read and is not to be set aside.
    """
    for index, raw in _bounded(rows, tally, base):
        try:
            row = introduced(shaped(mapped(raw, columns), index), tally.data.system)
        except Unusable as reason:
            tally.unusable(raw, str(reason))
            continue
        yield raw, row


def _bounded(rows: Iterable[Raw | BadRow], tally: Tally, base: int) -> Iterator[tuple[int, Raw]]:
    """The rows that can be read and are not too large, with their numbers."""
    for index, found in enumerate(rows, base):
        tally.counts["rows"] += 1
        raw = bounded(found) if isinstance(found, Raw) else found
        if isinstance(raw, Raw):
            yield index, raw
        else:
            tally.broken(raw)
