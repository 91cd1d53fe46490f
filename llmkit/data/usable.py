"""Reading sources: which rows can be used, and an account of those that cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmkit.core.errors import DataError
from llmkit.data.lint import Lint
from llmkit.data.node import Data, Readable
from llmkit.data.rows import BadRow, Raw, Row, Unusable, bounded, introduced, mapped, rejected
from llmkit.data.shapes import shaped


@dataclass
class Tally:
    """Counts rows that cannot be used, and hands them on where they are to be kept."""

    data: Data
    counts: Counter[str]
    aside: Callable[[BadRow], None] | None = None
    first: str = ""
    lint: Lint | None = None

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
        self.first = self.first or f"{raw.file}:{raw.line}: {reason}"
        if self.lint is not None:
            self.lint.refused(raw.file, raw.line, reason)
        if self.data.on_bad_row == "quarantine" and self.aside is not None:
            self.aside(rejected(raw, reason))

    def check(self, kept: int, least: int, key: str) -> None:
        """Raises: DataError when too many rows are unusable, or too few are left."""
        counts, training = self.counts, key.startswith("data.")
        table = ", ".join(f"{reason} {n}" for reason, n in counts.most_common() if reason != "rows" and n)
        bad = sum(n for reason, n in counts.items() if reason.startswith("unusable"))
        if counts["rows"] == 0:
            raise DataError("holds no rows", fix="give a file with rows", key=key)
        if bad > self.data.bad_share * counts["rows"]:
            what = f"{bad} of {counts['rows']} rows cannot be used ({table}; the first is {self.first})"
            raise DataError(what, fix="mend them, or raise data.bad_share" if training else "mend them", key=key)
        if not kept:
            what = f"no row is left to learn from ({table})"
            raise DataError(
                what, fix="raise data.max_length or mend the rows" if training else "mend the rows", key=key
            )
        if kept < least:
            what = f"{kept} examples do not fill one step of {least}" + (f" ({table})" if table else "")
            raise DataError(what, fix=f"set batch.rows={kept}", key=key)


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
    for index, found in enumerate(rows, base):
        tally.counts["rows"] += 1
        raw = bounded(found) if isinstance(found, Raw) else found
        if not isinstance(raw, Raw):
            tally.broken(raw)
            continue
        try:
            row = introduced(shaped(mapped(raw, columns), index), tally.data.system)
        except Unusable as reason:
            tally.unusable(raw, str(reason))
            continue
        yield raw, row
