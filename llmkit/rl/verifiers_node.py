"""Rewards that can be checked: mathematics, patterns, references, schemas, lengths and sections."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmkit.core.config import Conflict, config
from llmkit.rl.checked_node import NAME, NAMED, Checked, Lack, Weighed, column_lacks
from llmkit.rl.sample import Fault, Sample, Score
from llmkit.rl.shapes_node import Shape

if TYPE_CHECKING:
    from llmkit.rl.bench import Bench
    from llmkit.rl.checked import Check, Told


def _with(sample: Sample, column: str) -> Told:
    """An answer and one column of its row."""
    row = {column: sample.row[column]} if column in sample.row else {}
    return {"completion": sample.completion, "row": row, "named": list(sample.row)[:NAMED]}


def _bad_pattern(key: str, pattern: str | None) -> Iterator[Conflict]:
    if pattern is None:
        return
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as cause:
        yield Conflict(key, f"{pattern[:60]!r} is no regular expression ({cause})", "mend it")


@config
class Maths(Checked):
    """1 where the answer is worth what the reference is, as math-verify reads both (`pip install 'llmkit[maths]'`):
    fractions and decimals, sets, intervals, equations, LaTeX or plain; else 0."""

    kind: Literal["math"] = "math"
    column: str = "answer"
    """Where the reference is: a formula, a solution that ends in one, or GSM8K's text with ####."""
    where: Literal["anywhere", "boxed"] = "anywhere"
    """Whether only what the last \\boxed{} holds is an answer."""

    def sent(self, sample: Sample) -> Told:
        """The answer and the reference."""
        return _with(sample, self.column)

    def lacks(self, rows: Sequence[Mapping[str, Any]]) -> Lack | None:
        """A row without the reference."""
        return column_lacks(rows, self.column)

    def check(self) -> Check:
        """In the process."""
        from llmkit.rl.maths import check

        return check(self.column, self.where)


@config
class Pattern(Checked):
    """1 where a regular expression is found in the answer, else 0."""

    kind: Literal["regex"] = "regex"
    pattern: str
    whole: bool = False
    """Whether it must match all of the answer."""

    def problems(self) -> Iterator[Conflict]:
        """A pattern that is none."""
        yield from super().problems()
        yield from _bad_pattern("pattern", self.pattern)

    def check(self) -> Check:
        """In the process."""
        from llmkit.rl.checked import each

        made = re.compile(self.pattern)
        find = made.fullmatch if self.whole else made.search
        return each(lambda told: find(told["completion"]) is not None)


@config
class Exact(Checked):
    """1 where the answer is the text of a column, else 0."""

    kind: Literal["exact"] = "exact"
    column: str = "answer"
    extract: str | None = None
    """A regular expression: its last match in the answer (or the first group of it) is compared, and that in the
    column where it is found there."""
    ignore: tuple[Literal["space", "case", "punctuation"], ...] = ("space",)
    """What makes no difference: more or less space, capitals, or what is neither letter, digit nor space."""

    def problems(self) -> Iterator[Conflict]:
        """A pattern that is none."""
        yield from super().problems()
        yield from _bad_pattern("extract", self.extract)

    def sent(self, sample: Sample) -> Told:
        """The answer and the reference."""
        return _with(sample, self.column)

    def lacks(self, rows: Sequence[Mapping[str, Any]]) -> Lack | None:
        """A row without the reference."""
        return column_lacks(rows, self.column)

    def check(self) -> Check:
        """In the process."""
        from llmkit.rl.checked import column_of, each, last_match

        made = re.compile(self.extract) if self.extract is not None else None

        def score(told: Told) -> float:
            wanted, said = column_of(told, self.column), told["completion"]
            if made is not None:
                found = last_match(made, said)
                if found is None:
                    return 0.0
                wanted, said = last_match(made, wanted) or wanted, found
            return float(self._plain(wanted) == self._plain(said))

        return each(score)

    def _plain(self, text: str) -> str:
        if "punctuation" in self.ignore:
            text = "".join(c for c in text if c.isalnum() or c.isspace())
        if "case" in self.ignore:
            text = text.casefold()
        return " ".join(text.split()) if "space" in self.ignore else text


@config
class Schema(Checked):
    """1 where the answer is JSON that a schema allows, else 0 (`pip install 'llmkit[schema]'`)."""

    kind: Literal["json_schema"] = "json_schema"
    schema: str = ""
    """The schema, as JSON text; or `path`. What it refers to elsewhere is not fetched."""
    path: str = ""
    """A file that holds it."""
    where: Literal["whole", "fenced"] = "whole"
    """Whether the whole answer is JSON, or what its last ``` fence holds."""

    def files(self) -> dict[str, str]:
        """The schema's."""
        return {"path": self.path} if self.path else {}

    def problems(self) -> Iterator[Conflict]:
        """No schema, or two."""
        yield from super().problems()
        if bool(self.schema) == bool(self.path):
            what = "neither schema nor path is given" if not self.schema else "the schema is in a file and here"
            yield Conflict("schema", what, "give one of the two", "path" if self.schema else "")

    def ready(self) -> None:
        """
        Raises:
            RecipeError: the schema is none.
        """
        self.check()

    def check(self) -> Check:
        """In the process."""
        from llmkit.core.errors import RecipeError
        from llmkit.rl.schema import check

        try:
            text = Path(self.path).expanduser().read_text("utf-8") if self.path else self.schema
        except (OSError, ValueError) as cause:
            why = getattr(cause, "strerror", None) or "is not UTF-8"
            raise RecipeError(f"{self.path} cannot be read ({why})", fix="name a file of JSON", key="path") from cause
        return check(text, self.where, "path" if self.path else "schema")


@config
class Length(Weighed):
    """What the answer's length is worth."""

    kind: Literal["length"] = "length"
    shape: Shape
    unit: Literal["tokens", "characters", "words"] = "tokens"

    def score(self, samples: Sequence[Sample], bench: Bench) -> list[Score]:
        """A score for each."""
        return [self._of(sample) for sample in samples]

    def _of(self, sample: Sample) -> Score:
        if self.unit != "tokens":
            return self.shape.worth(len(sample.completion if self.unit == "characters" else sample.completion.split()))
        if sample.completion and not sample.token_ids:
            return Fault("tells no tokens, as the answer of an endpoint", "set unit: characters or words", True)
        return self.shape.worth(len(sample.token_ids))


@config
class Format(Weighed):
    """1 where the answer is made of sections in tags, each once and in this order, else 0."""

    kind: Literal["format"] = "format"
    tags: tuple[str, ...] = ("think", "answer")
    rest: bool = False
    """Whether text may follow the last section; none may stand before the first or between them."""
    begun: bool = False
    """Whether the prompt has opened the first one already."""

    def problems(self) -> Iterator[Conflict]:
        """No tags, or such as are none."""
        yield from super().problems()
        if not self.tags or len(set(self.tags)) < len(self.tags) or not all(map(NAME.fullmatch, self.tags)):
            yield Conflict("tags", "is no list of different names", "give some, such as [think, answer]")

    def score(self, samples: Sequence[Sample], bench: Bench) -> list[Score]:
        """A score for each."""
        from llmkit.rl.format import sections

        return [sections(sample.completion, self.tags, self.rest, self.begun) for sample in samples]
